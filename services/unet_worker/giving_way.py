"""A forward gives cores away while decode chunks run on the same device, and takes them back.

Chunks come and go in the middle of a forward, and are much shorter. With threads fixed for a whole
slot, the cores left to chunks would be idle before they come and after they have gone.

A forward looks for chunks by an operation of its own, `synerdiff::give_way`, which hands its input
on: Python hooks would be lost where the UNet is run as a recorded graph (`unet_forward`).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch

T = TypeVar("T")

LAYERS = (torch.nn.Conv2d, torch.nn.LayerNorm)
"""Ahead of each a forward looks; no two are far from each other. By whole blocks it would be done
too late: until the next one both sides together have more threads than there are cores."""

TURN = 8
"""So many looks a part goes on before it lets another one do as many."""

_LOOK_AGAIN_S = 0.001
"""While a part waits: nobody tells it that the chunks are over."""

_DONE = sys.maxsize

_here = threading.local()


class GivingWay:
    """Sets the threads of a forward ahead of the layers that `watch` has found.

    Args:
        has_chunks_beside: Whether chunks run now; asked often, so it should take microseconds.

    Attributes:
        running: Of this process, whose one thread computes; an operation has no other way to it.
    """

    running: ClassVar[GivingWay | None] = None

    def __init__(self, has_chunks_beside: Callable[[], bool]) -> None:
        self._has_chunks_beside = has_chunks_beside
        self._threads = self._threads_beside = 0

    def run(self, call: Callable[[], T], *, threads: int, threads_beside: int) -> T:
        """The call's result; its forwards run on `threads`, or while chunks run on the others.

        threads: those that are set already. threads_beside: 0 for no difference.
        """
        if not threads_beside:
            return call()
        self._threads = threads
        self._threads_beside = threads_beside
        GivingWay.running = self
        try:
            return call()
        finally:
            GivingWay.running = None
            set_threads(threads)

    def turns(self, num_parts: int, threads: int) -> Turns:
        """Of a forward's parts, each on so many threads."""
        num_beside = max(self._threads_beside // threads, 1)
        return Turns(num_parts, num_beside, self._has_chunks_beside)

    def look(self) -> None:
        """Set the threads by whether chunks run now."""
        set_threads(self._threads_beside if self._has_chunks_beside() else self._threads)


class Turns:
    """Parts of one forward that run side by side, and while chunks run only some at a time.

    Those take turns, so that all stay at about the same layer. If always the same one waited, it
    would be alone in the end, and leave the others' cores idle.

    Args:
        num_parts: Each on a thread of its own.
        num_beside: Parts that go on while chunks run.
        has_chunks_beside: As in `GivingWay`.
    """

    def __init__(
        self, num_parts: int, num_beside: int, has_chunks_beside: Callable[[], bool]
    ) -> None:
        self._num_beside = num_beside
        self._has_chunks_beside = has_chunks_beside
        self._looks = [0] * num_parts
        self._news = threading.Condition()

    @contextlib.contextmanager
    def taken_by(self, part: int) -> Iterator[None]:
        """Meanwhile this thread runs that part, from its beginning to its end."""
        _here.look = lambda: self._look(part)
        try:
            yield
        finally:
            del _here.look
            with self._news:
                self._looks[part] = _DONE
                self._news.notify_all()

    def _look(self, part: int) -> None:
        """Wait while chunks run and as many parts as may go on are behind this one."""
        self._looks[part] += 1
        if self._looks[part] % TURN or not self._has_chunks_beside():
            return
        with self._news:
            self._news.notify_all()
            while self._num_before(part) >= self._num_beside and self._has_chunks_beside():
                self._news.wait(_LOOK_AGAIN_S)

    def _num_before(self, part: int) -> int:
        own = (self._looks[part] // TURN, part)
        return sum((looks // TURN, i) < own for i, looks in enumerate(self._looks))


def set_threads(threads: int) -> None:
    """How many of them the calling thread computes on."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def watch(unet: torch.nn.Module) -> None:
    """From now on the UNet's forwards look for chunks; once for each UNet, ahead of recording."""
    for module in unet.modules():
        if isinstance(module, LAYERS):
            module.register_forward_pre_hook(_look_ahead)


def _look_ahead(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.ops.synerdiff.give_way(inputs[0]), *inputs[1:])


def _give_way(x: torch.Tensor) -> torch.Tensor:
    if GivingWay.running:
        look = getattr(_here, "look", GivingWay.running.look)
        look()
    return x


torch.library.define("synerdiff::give_way", "(Tensor(a) x) -> Tensor(a)")
torch.library.impl("synerdiff::give_way", "cpu", _give_way)
