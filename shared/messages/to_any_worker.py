"""Commands that both kinds of worker take, from the scheduler."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class BeginEpoch:
    """This epoch's scheduler does not know what you hold: drop queued slots and decodes, announce.

    Of a new scheduler, and of the same one where a worker comes back or has kept it waiting; what
    was moved meanwhile is released by the answer to the announcement. An older epoch's is ignored.
    """

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaveWhenDone:
    """Whatever the scheduler had for this draining worker has been sent: nothing new comes."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RefuseWorker:
    """The worker can't join, as it is: it ends by a configuration error."""

    epoch: int
    reason: str
    """A sentence for whoever started it."""


ToAnyWorker = BeginEpoch | LeaveWhenDone | RefuseWorker
