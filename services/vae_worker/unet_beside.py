"""What passes between a VAE worker and the UNet workers of its device: words of their pools."""

from __future__ import annotations

import contextlib
import threading
import time

from shared.errors import HandleLostError
from shared.messages import GrantChunks
from shared.tensors.reader import TensorReader

CHUNK_LEASE_NS = 2_000_000_000
"""A UNet worker gives way to a chunk for at most so long."""

NEXT_CHUNK_NS = 2_000_000
"""And for so long after it, so that it doesn't take its cores back for the moment between two."""


class UnetBeside:
    """Tells when slots begin, and says while chunks run; its methods may be called by any thread.

    Several decodes may run beside the same slots: a UNet worker gives way until the last is over.
    """

    def __init__(self, reader: TensorReader) -> None:
        self._reader = reader
        self._lock = threading.Lock()
        self._until_ns: dict[str, dict[str, int]] = {}  # by pool and request

    def has_begun(self, grant: GrantChunks) -> bool:
        """Tell whether the slots that a grant has to wait for are over, or can't be waited for."""
        if not grant.beside_seq or not grant.pool:
            return True
        try:
            return self._reader.running_seq(grant.pool) >= grant.beside_seq
        except HandleLostError:
            return True

    def begin_chunk(self, grant: GrantChunks) -> None:
        """Say that a chunk of that grant runs from now on."""
        self._note(grant, CHUNK_LEASE_NS)

    def end_chunk(self, grant: GrantChunks, *, is_last: bool) -> None:
        """Say that it has ended; behind the last one of a decode there is none to wait for."""
        self._note(grant, 0 if is_last else NEXT_CHUNK_NS)

    def _note(self, grant: GrantChunks, busy_ns: int) -> None:
        if not grant.pool:
            return
        now_ns = time.monotonic_ns()
        with self._lock:
            known = self._until_ns.pop(grant.pool, {})
            running = {name: ns for name, ns in known.items() if ns > now_ns}
            running[grant.request_id] = now_ns + busy_ns
            with contextlib.suppress(HandleLostError):
                self._reader.note_chunks(grant.pool, until_ns=max(running.values()))
                self._until_ns[grant.pool] = running
