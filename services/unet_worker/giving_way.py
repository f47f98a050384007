"""A forward gives cores away while decode chunks run on the same device, and takes them back.

Chunks come and go in the middle of a forward, and are much shorter. With threads fixed for a whole
slot, the cores left to chunks would be idle before they come and after they have gone.

A forward looks for chunks by an operation of its own, `synerdiff::give_way`, which hands its input
on: Python hooks would be lost where the UNet is run as a recorded graph (`unet_forward`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch

T = TypeVar("T")

LAYERS = (torch.nn.Conv2d, torch.nn.LayerNorm)
"""Ahead of each the threads are set; no two are far from each other. By whole blocks it would be
done too late: until the next one both sides together have more threads than there are cores."""


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
        self._threads = self._threads_beside = self._now = 0

    def run(self, call: Callable[[], T], *, threads: int, threads_beside: int) -> T:
        """The call's result; its forwards run on `threads`, or while chunks run on the others.

        threads: those that are set already. threads_beside: 0 for no difference.
        """
        if not threads_beside:
            return call()
        self._threads = self._now = threads
        self._threads_beside = threads_beside
        GivingWay.running = self
        try:
            return call()
        finally:
            GivingWay.running = None
            self._set(threads)

    def look(self) -> None:
        """Set the threads by whether chunks run now."""
        self._set(self._threads_beside if self._has_chunks_beside() else self._threads)

    def _set(self, threads: int) -> None:
        if threads != self._now:
            torch.set_num_threads(threads)
            self._now = threads


def watch(unet: torch.nn.Module) -> None:
    """From now on the UNet's forwards look for chunks; once for each UNet, ahead of recording."""
    for module in unet.modules():
        if isinstance(module, LAYERS):
            module.register_forward_pre_hook(_look_ahead)


def _look_ahead(_module: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (torch.ops.synerdiff.give_way(inputs[0]), *inputs[1:])


def _give_way(x: torch.Tensor) -> torch.Tensor:
    if GivingWay.running:
        GivingWay.running.look()
    return x


torch.library.define("synerdiff::give_way", "(Tensor(a) x) -> Tensor(a)")
torch.library.impl("synerdiff::give_way", "cpu", _give_way)
