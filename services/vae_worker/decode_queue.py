"""The decodes at a worker and the chunks of them that were granted: who may run next.

Knows neither tensors nor threads; the clock is passed in.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any

from shared.messages import CancelDecode, DecodeLatents, GrantChunks

GRANT_WAIT_S = 10.0
"""A grant bound to a slot waits at most so long for it: nothing waits for a slot that is lost."""


@dataclass(slots=True, kw_only=True)
class PendingGrant:
    """Chunks that may run, once their slot has begun."""

    command: GrantChunks

    left: int
    """Chunks that have not run yet."""

    expires_at: float
    """When it stops waiting for its slot, on the monotonic clock."""

    device_s: float = 0.0
    """What its chunks took of the threads granted: on half of them, half of the time."""


@dataclass(slots=True, kw_only=True, eq=False)
class Decode:
    """A decode at this worker."""

    command: DecodeLatents

    grants: deque[PendingGrant] = field(default_factory=deque)
    """Oldest first."""

    is_running: bool = False
    """Whether a compute thread has it."""

    is_dropped: bool = False
    """Whether nobody wants it any more; what runs of it stops at the next chunk."""

    chunks: Generator[int, None, Any] | None = None
    """The decode itself; None until its first chunk."""

    num_chunks: int = 0
    num_done: int = 0

    compute_s: float = 0.0
    """By the clock."""

    device_s: float = 0.0
    """As `PendingGrant.device_s`, of all chunks."""

    transport: str = ""


class DecodeQueue:
    """The decodes of one worker, in the order of their arrival."""

    def __init__(self) -> None:
        self._decodes: dict[str, Decode] = {}
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._decodes)

    def is_current(self, epoch: int) -> bool:
        """Tell whether a scheduler of that epoch is to be obeyed."""
        return epoch >= self._epoch

    def begin_epoch(self, epoch: int) -> None:
        """Drop everything: decodes are short, and the scheduler asks anew for what it wants."""
        self._epoch = epoch
        self.drop_all()

    def add(self, command: DecodeLatents) -> None:
        """Take a decode; it replaces one of another attempt, and one that is here stays."""
        known = self._decodes.get(command.request_id)
        if known and known.command.attempt == command.attempt:
            return
        if known:
            self.drop(known)
        self._decodes[command.request_id] = Decode(command=command)

    def grant(self, command: GrantChunks, now: float) -> None:
        """Let chunks of a decode run; of one that is not here, nothing happens."""
        decode = self._find(command)
        if decode:
            decode.grants.append(
                PendingGrant(command=command, left=command.chunks, expires_at=now + GRANT_WAIT_S)
            )

    def cancel(self, command: CancelDecode) -> None:
        """Drop a decode if that very attempt is here."""
        decode = self._find(command)
        if decode:
            self.drop(decode)

    def drop(self, decode: Decode) -> None:
        """Forget a decode and free what it holds, which a running one does at its next chunk."""
        decode.is_dropped = True
        if self._decodes.get(decode.command.request_id) is decode:
            del self._decodes[decode.command.request_id]
        if decode.chunks and not decode.is_running:
            decode.chunks.close()

    def begin_run(self, decode: Decode) -> None:
        """A compute thread takes a decode."""
        decode.is_running = True

    def end_run(self, decode: Decode) -> None:
        """It gives the decode back."""
        decode.is_running = False
        if decode.is_dropped:
            self.drop(decode)

    def drop_all(self) -> None:
        """Drop every decode."""
        for decode in list(self._decodes.values()):
            self.drop(decode)

    def waiting(self) -> list[Decode]:
        """Return the decodes that have a grant and don't run, oldest first."""
        return [
            decode for decode in self._decodes.values() if decode.grants and not decode.is_running
        ]

    def runnable(self, now: float, has_begun: Callable[[GrantChunks], bool]) -> list[Decode]:
        """Return those of `waiting` whose slot has begun, or has been waited for too long."""
        return [
            decode
            for decode in self.waiting()
            if now >= decode.grants[0].expires_at or has_begun(decode.grants[0].command)
        ]

    def _find(self, command: GrantChunks | CancelDecode) -> Decode | None:
        decode = self._decodes.get(command.request_id)
        return decode if decode and decode.command.attempt == command.attempt else None
