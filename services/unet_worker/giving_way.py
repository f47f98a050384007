"""A forward gives cores away while decode chunks run on the same device, and takes them back.

Chunks come and go in the middle of a forward, and are much shorter. With threads fixed for a whole
slot, the cores left to chunks would be idle before they come and after they have gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")

LAYERS = (torch.nn.Conv2d, torch.nn.Linear, torch.nn.GroupNorm)
"""Ahead of each the threads are set. By whole blocks it would be done too late: until the next one
both sides together have more threads than there are cores."""


class GivingWay:
    """Sets the threads of a forward ahead of each larger layer of its UNet.

    The UNet is watched from the first forward on that may have to give way; on a GPU none has.

    Args:
        unet: Whose layers are watched.
        has_chunks_beside: Whether chunks run now; asked often, so it should take microseconds.
    """

    def __init__(self, unet: torch.nn.Module, has_chunks_beside: Callable[[], bool]) -> None:
        self._unet = unet
        self._has_chunks_beside = has_chunks_beside
        self._threads = self._threads_beside = self._now = 0
        self._is_watching = False

    def run(self, call: Callable[[], T], *, threads: int, threads_beside: int) -> T:
        """The call's result; its forwards run on `threads`, or while chunks run on the others.

        threads: those that are set already. threads_beside: 0 for no difference.
        """
        self._threads = self._now = threads
        self._threads_beside = threads_beside
        if threads_beside and not self._is_watching:
            self._watch()
        try:
            return call()
        finally:
            self._set(threads)
            self._threads_beside = 0

    def _watch(self) -> None:
        for module in self._unet.modules():
            if isinstance(module, LAYERS):
                module.register_forward_pre_hook(self._look)
        self._is_watching = True

    def _look(self, _module: torch.nn.Module, _inputs: object) -> None:
        if self._threads_beside:
            self._set(self._threads_beside if self._has_chunks_beside() else self._threads)

    def _set(self, threads: int) -> None:
        if threads != self._now:
            torch.set_num_threads(threads)
            self._now = threads
