"""The stages of a diffusers decoder: passes over the feature map, each of one convolution.

A stage runs whole, with the library's own kernels and thus its own bits; some can also run strip
by strip (`strips`). Stages keep no state: what lies between them is held by `decoder`.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from shared.threads import running_on

FLOPS_PER_BYTE = 10.0
"""How many operations take as long as a byte from or to memory, for cost estimates (an AVX2 core in
fp32; far higher where matrix units do the work, which is what measured costs are for)."""

MIN_POSITIONS_SPLIT = 1024
"""Positions of a map from which on PyTorch splits a group norm's sums over threads."""

MIN_CONV_CHANNELS = 16
"""Convolution kernels pad fewer output channels than this with zeros and compute those too."""


def conv_flops(conv: nn.Conv2d, pixels: int) -> float:
    """Return the operations of a convolution for so many output pixels."""
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return 2.0 * taps * conv.in_channels * max(conv.out_channels, MIN_CONV_CHANNELS) * pixels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stem:
    """Latents to features: scaling and shift, `post_quant_conv` and `conv_in`."""

    enlarges: ClassVar[int] = 1
    name: str

    scaling_factor: float
    shift_factor: float
    """Of the latents' format."""

    post_quant_conv: nn.Conv2d | None
    """None in a decoder without."""

    conv_in: nn.Conv2d

    is_bounded: bool = False
    """Whether latents are squeezed into a range of 3, as tiny autoencoders want them."""

    def whole(self, latents: Tensor) -> Tensor:
        """Return the first features, as diffusers' pipelines compute them.

        Args:
            latents: Scaled and shifted, of any float dtype, on any device.
        """
        weight = self.conv_in.weight
        latents = latents / self.scaling_factor
        if self.shift_factor:
            latents = latents + self.shift_factor
        latents = latents.to(device=weight.device, dtype=weight.dtype)
        if self.is_bounded:
            latents = (latents / 3).tanh() * 3
        if self.post_quant_conv is not None:
            latents = project(self.post_quant_conv, latents)
        features: Tensor = self.conv_in(latents)
        return features

    def cost(self, pixels: int, itemsize: int) -> float:
        """Return the estimated operations for `pixels` output pixels of one sample."""
        channels = self.conv_in.in_channels + self.conv_in.out_channels
        return conv_flops(self.conv_in, pixels) + FLOPS_PER_BYTE * channels * pixels * itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormConv:
    """GroupNorm, activation, 3x3 convolution: half a resnet, or the decoder's output layer.

    A resnet's first half `opens_residual`: its input, through `shortcut` where there is one, waits
    to be added to the result of the second half, which `closes_residual`, and divided by `divisor`.
    """

    enlarges: ClassVar[int] = 1
    name: str
    norm: nn.GroupNorm
    activation: Any
    conv: nn.Conv2d
    shortcut: nn.Conv2d | None = None
    opens_residual: bool = False
    closes_residual: bool = False
    divisor: float = 1.0

    def whole(self, features: Tensor) -> Tensor:
        """Return the whole map, computed by the library's modules."""
        result: Tensor = self.conv(activate(self.activation, normalise(self.norm, features)))
        return result

    def cost(self, pixels: int, itemsize: int) -> float:
        """Return the estimated operations for `pixels` output pixels of one sample."""
        flops = conv_flops(self.conv, pixels)
        if self.shortcut is not None:
            flops += conv_flops(self.shortcut, pixels)
        # statistics read; normalise and activate read and write; the convolution reads and writes
        channels = 6 * self.conv.in_channels + self.conv.out_channels
        return flops + FLOPS_PER_BYTE * channels * pixels * itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upsample:
    """Twice the height and width (nearest), then a 3x3 convolution."""

    enlarges: ClassVar[int] = 2
    name: str
    module: Any

    conv: nn.Conv2d
    """A part of `module`."""

    def whole(self, features: Tensor) -> Tensor:
        """Return the whole map, computed by the library's module."""
        result: Tensor = self.module(features)
        return result

    def cost(self, pixels: int, itemsize: int) -> float:
        """Return the estimated operations for `pixels` output pixels of one sample."""
        channels = 2 * self.conv.in_channels + self.conv.out_channels
        return conv_flops(self.conv, pixels) + FLOPS_PER_BYTE * channels * pixels * itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """Self-attention over all pixels; always whole."""

    enlarges: ClassVar[int] = 1
    name: str
    channels: int
    module: Any

    def whole(self, features: Tensor) -> Tensor:
        """Return the whole map, computed by the library's module."""
        result: Tensor = self.module(features)
        return result

    def cost(self, pixels: int, itemsize: int) -> float:
        """Return the estimated operations for `pixels` output pixels of one sample."""
        flops = 8.0 * self.channels * self.channels * pixels + 4.0 * self.channels * pixels * pixels
        return flops + FLOPS_PER_BYTE * 10 * self.channels * pixels * itemsize


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TinyLayers:
    """A layer of an `AutoencoderTiny`'s decoder with those ahead of it that have no weights.

    They are cheap enough never to be cut into strips.
    """

    name: str
    layers: tuple[nn.Module, ...]

    enlarges: int
    """How many times as high and wide the result is."""

    is_last: bool
    """Whether the result is the image in [0, 1], which diffusers stretches to [-1, 1]."""

    def whole(self, features: Tensor) -> Tensor:
        """Return the whole map, computed by the library's modules."""
        for layer in self.layers:
            features = layer(features)
        return features.mul(2).sub(1) if self.is_last else features

    def cost(self, pixels: int, itemsize: int) -> float:
        """Return the estimated operations for `pixels` output pixels of one sample."""
        convs = [
            part for layer in self.layers for part in layer.modules() if isinstance(part, nn.Conv2d)
        ]
        flops = sum(conv_flops(conv, pixels) for conv in convs)
        channels = sum(2 * conv.in_channels + conv.out_channels for conv in convs)
        return flops + FLOPS_PER_BYTE * channels * pixels * itemsize


Stage = Stem | NormConv | Upsample | Attention | TinyLayers


def normalise(norm: nn.GroupNorm, features: Tensor) -> Tensor:
    """Return the norm of a map, the same to the bit on any number of threads.

    PyTorch's kernel for larger `channels_last` maps splits their sums over threads.
    """
    is_split = features.shape[2] * features.shape[3] >= MIN_POSITIONS_SPLIT
    with running_on(1) if is_split else contextlib.nullcontext():
        result: Tensor = norm(features)
    return result


def project(conv: nn.Conv2d, features: Tensor) -> Tensor:
    """Return a convolution of single positions, the same to the bit on any number of threads.

    In float32 PyTorch computes it by another library on one thread than on several.
    """
    depends_on_threads = features.dtype is torch.float32 and conv.kernel_size == (1, 1)
    with running_on(1) if depends_on_threads else contextlib.nullcontext():
        result: Tensor = conv(features)
    return result


def activate(activation: Any, hidden_states: Tensor) -> Tensor:
    """Return the activation, computed in place where that gives the library's bits (SiLU)."""
    if isinstance(activation, nn.SiLU) and not _is_one_pixel(hidden_states):
        return functional.silu(hidden_states, inplace=True)
    result: Tensor = activation(hidden_states)
    return result


def add_residual(hidden_states: Tensor, residual: Tensor, divisor: float) -> Tensor:
    """Return `(residual + hidden_states) / divisor`, in place where that gives the same bits."""
    if _is_one_pixel(hidden_states):
        return (residual + hidden_states) / divisor
    hidden_states += residual
    return hidden_states if divisor == 1.0 else hidden_states.div_(divisor)


def _is_one_pixel(hidden_states: Tensor) -> bool:
    """Tell whether strides say nothing of the memory format.

    An operator that makes a new tensor then chooses other strides than it was given, and the
    library's next kernels follow them: working in place would give other bits.
    """
    return hidden_states.shape[2:] == (1, 1)
