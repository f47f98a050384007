from __future__ import annotations

import io
import logging
import os

from shared.logs import PatientHandler


class Disk(io.StringIO):
    """A file whose disk may be full."""

    is_full = False

    def write(self, text: str) -> int:
        if self.is_full:
            raise OSError(28, os.strerror(28))
        return super().write(text)


def test_lines_that_cannot_be_written_are_dropped_and_counted() -> None:
    disk = Disk()
    logger = logging.getLogger("patient")
    handler = PatientHandler(disk)
    logger.addHandler(handler)
    logging.getLogger("shared.logs").addHandler(handler)
    try:
        logger.warning("before")
        disk.is_full = True
        for _ in range(3):
            logger.warning("lost")
        disk.is_full = False
        logger.warning("after")
        logger.warning("later")
    finally:
        logging.getLogger("shared.logs").removeHandler(handler)
    assert disk.getvalue().splitlines() == [
        "before",
        "3 log lines could not be written",
        "after",
        "later",
    ]
