"""A forward gives cores away while decode chunks run on the same device, and takes them back.

Chunks come and go in the middle of a forward, and are much shorter. With threads fixed for a whole
slot, the cores left to chunks would be idle before they come and after they have gone.

A forward looks for chunks by an operation of its own, `synerdiff::give_way`, which hands its input
on: Python hooks would be lost where the UNet is run as a recorded graph (`unet_forward`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, TypeVar

import torch

from shared.messages import NO_ROOM, SlotShape
from shared.threads import set_threads

T = TypeVar("T")

LAYERS = (torch.nn.Conv2d, torch.nn.LayerNorm)
"""Ahead of each a forward looks; no two are far from each other. By whole blocks it would be done
too late: until the next one both sides together have more threads than there are cores."""

_LOOK_AGAIN_S = 0.001
"""While a part waits: nobody tells it that the chunks are over."""

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
        self._threads = 0
        self._shape = NO_ROOM

    def run(self, call: Callable[[], T], *, threads: int, shape: SlotShape) -> T:
        """The call's result; its forwards run on `threads`, and give way as the shape says.

        threads: those that are set already.
        """
        if not shape.threads_beside:
            return call()
        self._threads, self._shape = threads, shape
        GivingWay.running = self
        try:
            return call()
        finally:
            GivingWay.running = None
            set_threads(threads)

    def part_sizes(self, rows: int, num_parts: int) -> list[int]:
        """Rows of each of a forward's parts, each on a thread; those that wait come last.

        There are fewer parts where some would have no rows.
        """
        num_going_on = min(self._shape.threads_beside, num_parts)
        if num_going_on == num_parts:
            return even_sizes(rows, num_parts)
        waiting_rows = self._shape.waiting_rows(rows)
        going_on = even_sizes(rows - waiting_rows, num_going_on)
        return going_on + even_sizes(waiting_rows, num_parts - num_going_on)

    def parts(self, num_parts: int, threads: int) -> Parts:
        """Of a forward, each on so many threads."""
        num_beside = max(self._shape.threads_beside // threads, 1)
        return Parts(num_parts, num_beside, self._has_chunks_beside)

    def look(self) -> None:
        """Set the threads by whether chunks run now."""
        beside = self._has_chunks_beside()
        set_threads(self._shape.threads_beside if beside else self._threads)


class Parts:
    """Parts of one forward that run side by side, and while chunks run only the first so many.

    The others wait until the chunks are over or one of the first is done. Letting them take turns
    instead costs as much as it evens out: each change wakes a thread, often on the chunks' core.

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
        self._is_left = [True] * num_parts
        self._news = threading.Condition()

    @contextlib.contextmanager
    def running(self, part: int) -> Iterator[None]:
        """Meanwhile this thread runs that part, from its beginning to its end."""
        _here.look = lambda: self._look(part)
        try:
            yield
        finally:
            del _here.look
            with self._news:
                self._is_left[part] = False
                self._news.notify_all()

    def _look(self, part: int) -> None:
        """Wait while chunks run and as many parts as may go on are ahead of this one."""
        if part < self._num_beside or not self._has_chunks_beside():
            return
        with self._news:
            while sum(self._is_left[:part]) >= self._num_beside and self._has_chunks_beside():
                self._news.wait(_LOOK_AGAIN_S)


def even_sizes(rows: int, num_parts: int) -> list[int]:
    """Rows of each of so many parts, as even as they can be; no part is empty."""
    sizes = [rows // num_parts + (i < rows % num_parts) for i in range(num_parts)]
    return [size for size in sizes if size]


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
