"""A diffusers decoder as a list of stages: passes over the feature map, each of one convolution.

A stage runs whole, with the library's own kernels and thus its own bits, or strip by strip. The
stages keep no state; what lies between them is `FeatureMap`s, held by `chunked_decoder`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from services.vae_worker.strips import (
    CONV_HALO,
    FeatureMap,
    GroupStatistics,
    activate,
    convolve_rows,
    normalised_rows,
    upsampled_rows,
)
from shared.errors import ConfigurationError

FLOPS_PER_BYTE = 10.0
"""How many operations take as long as a byte from or to memory, for cost estimates (an AVX2 core in
fp32; far higher where matrix units do the work, which is what measured costs are for)."""

MIN_CONV_CHANNELS = 16
"""Convolution kernels pad fewer output channels than this with zeros and compute those too."""


def _conv_flops(conv: nn.Conv2d, pixels: int) -> float:
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    return 2.0 * taps * conv.in_channels * max(conv.out_channels, MIN_CONV_CHANNELS) * pixels


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Stem:
    """Latents to features: the latents' format, `post_quant_conv` and `conv_in`."""

    enlarges: ClassVar[int] = 1
    name: str

    scaling_factor: float
    """Of the latents' format."""

    shift_factor: float
    """Of the latents' format."""

    post_quant_conv: nn.Conv2d | None
    """None in a VAE without."""

    conv_in: nn.Conv2d

    is_bounded: bool = False
    """Whether latents are squeezed into a range of 3, as tiny autoencoders want them."""

    def whole(self, latents: Tensor) -> Tensor:
        """Return the features as the pipeline computes them, in the decoder's dtype, on its device.

        Args:
            latents: Scaled and shifted, of any float dtype.
        """
        weight = self.conv_in.weight
        latents = latents / self.scaling_factor
        if self.shift_factor:
            latents = latents + self.shift_factor
        latents = latents.to(device=weight.device, dtype=weight.dtype)
        if self.is_bounded:
            latents = (latents / 3).tanh() * 3
        if self.post_quant_conv is not None:
            latents = self.post_quant_conv(latents)
        features: Tensor = self.conv_in(latents)
        return features

    def cost(self, pixels: int, itemsize: int) -> float:
        """Estimated cost in operations for `pixels` output pixels of one sample."""
        channels = self.conv_in.in_channels + self.conv_in.out_channels
        return _conv_flops(self.conv_in, pixels) + FLOPS_PER_BYTE * channels * pixels * itemsize

    def row_elements(self, width: int) -> int:
        """Elements of the wider of input and output in one output row."""
        return self.conv_in.out_channels * width


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
        """The whole map by the library's modules."""
        result: Tensor = self.conv(activate(self.activation, self.norm(features)))
        return result

    def strip(
        self, source: FeatureMap, statistics: GroupStatistics | None, first: int, end: int
    ) -> Tensor:
        """Output rows first to end (exclusive), by the statistics of the whole input."""
        assert statistics is not None
        window = normalised_rows(
            source,
            first - CONV_HALO,
            end + CONV_HALO,
            norm=self.norm,
            statistics=statistics,
            activation=self.activation,
        )
        return convolve_rows(self.conv, window)

    def first_source_row(self, row: int) -> int:
        """The uppermost input row that output row `row` reads."""
        return max(row - CONV_HALO, 0)

    def cost(self, pixels: int, itemsize: int) -> float:
        """Estimated cost in operations for `pixels` output pixels of one sample."""
        flops = _conv_flops(self.conv, pixels)
        if self.shortcut is not None:
            flops += _conv_flops(self.shortcut, pixels)
        # statistics read; normalise and activate read and write; the convolution reads and writes
        channels = 6 * self.conv.in_channels + self.conv.out_channels
        return flops + FLOPS_PER_BYTE * channels * pixels * itemsize

    def row_elements(self, width: int) -> int:
        """Elements of the wider of input and output in one output row."""
        return max(self.conv.in_channels, self.conv.out_channels) * width


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Upsample:
    """Twice the height and width (nearest), then a 3x3 convolution."""

    enlarges: ClassVar[int] = 2
    name: str
    module: Any
    conv: nn.Conv2d

    def whole(self, features: Tensor) -> Tensor:
        """The whole map by the library's module, which `conv` is a part of."""
        result: Tensor = self.module(features)
        return result

    def strip(
        self, source: FeatureMap, statistics: GroupStatistics | None, first: int, end: int
    ) -> Tensor:
        """Output rows first to end (exclusive); the enlarged map exists for these rows only."""
        assert statistics is None
        window = upsampled_rows(source, first - CONV_HALO, end + CONV_HALO)
        return convolve_rows(self.conv, window)

    def first_source_row(self, row: int) -> int:
        """The uppermost input row that output row `row` reads."""
        return max(row - CONV_HALO, 0) // self.enlarges

    def cost(self, pixels: int, itemsize: int) -> float:
        """Estimated cost in operations for `pixels` output pixels of one sample."""
        channels = 2 * self.conv.in_channels + self.conv.out_channels
        return _conv_flops(self.conv, pixels) + FLOPS_PER_BYTE * channels * pixels * itemsize

    def row_elements(self, width: int) -> int:
        """Elements of the wider of input and output in one output row."""
        return max(self.conv.in_channels, self.conv.out_channels) * width


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attention:
    """Self-attention over all pixels; always whole."""

    enlarges: ClassVar[int] = 1
    name: str
    channels: int
    module: Any

    def whole(self, features: Tensor) -> Tensor:
        """The whole map by the library's module."""
        result: Tensor = self.module(features)
        return result

    def cost(self, pixels: int, itemsize: int) -> float:
        """Estimated cost in operations for `pixels` output pixels of one sample."""
        flops = 8.0 * self.channels * self.channels * pixels + 4.0 * self.channels * pixels * pixels
        return flops + FLOPS_PER_BYTE * 10 * self.channels * pixels * itemsize

    def row_elements(self, width: int) -> int:
        """Elements of the wider of input and output in one output row."""
        return self.channels * width


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Whole:
    """Any layer of a tiny autoencoder, which is cheap enough never to be cut into strips."""

    name: str
    module: nn.Module
    channels: int

    enlarges: int = 1
    """Output pixels of a side for one of the input's."""

    is_last: bool = False
    """Whether its output is the image in [0, 1], which the library stretches to [-1, 1]."""

    def whole(self, features: Tensor) -> Tensor:
        """Return the whole map by the library's module."""
        result: Tensor = self.module(features)
        return result.mul(2).sub(1) if self.is_last else result

    def cost(self, pixels: int, itemsize: int) -> float:
        """Return the estimated cost in operations for `pixels` output pixels of one sample."""
        convolutions = [layer for layer in self.module.modules() if isinstance(layer, nn.Conv2d)]
        flops = sum(_conv_flops(layer, pixels) for layer in convolutions)
        return flops + FLOPS_PER_BYTE * 2 * self.channels * pixels * itemsize

    def row_elements(self, width: int) -> int:
        """Return the elements of one output row."""
        return self.channels * width


Strippable = NormConv | Upsample
Stage = Stem | Strippable | Attention | Whole


def read_stages(vae: Any) -> list[Stage]:
    """Return the stages of a diffusers autoencoder's decode, in the order in which they run.

    Args:
        vae: An `AutoencoderKL` or an `AutoencoderTiny`.

    Raises:
        ConfigurationError: The decoder has a block that this module can't take apart.
    """
    return _read_tiny(vae) if type(vae).__name__ == "AutoencoderTiny" else _read_kl(vae)


def _read_tiny(vae: Any) -> list[Stage]:
    first, *layers = vae.decoder.layers
    stages: list[Stage] = [
        Stem(
            name="layers.0",
            scaling_factor=vae.config.scaling_factor,
            shift_factor=0.0,
            post_quant_conv=None,
            conv_in=first,
            is_bounded=True,
        )
    ]
    channels = first.out_channels
    for number, layer in enumerate(layers, start=1):
        stages.append(
            Whole(
                name=f"layers.{number}",
                module=layer,
                channels=channels,
                enlarges=_scale_of(layer),
                is_last=number == len(layers),
            )
        )
    return stages


def _scale_of(layer: nn.Module) -> int:
    return int(cast("float", layer.scale_factor)) if isinstance(layer, nn.Upsample) else 1


def _read_kl(vae: Any) -> list[Stage]:
    decoder = vae.decoder
    stages: list[Stage] = [
        Stem(
            name="conv_in",
            scaling_factor=vae.config.scaling_factor,
            shift_factor=vae.config.shift_factor or 0.0,
            post_quant_conv=vae.post_quant_conv,
            conv_in=decoder.conv_in,
        )
    ]
    middle = decoder.mid_block
    stages += _resnet_stages("mid_block.resnets.0", middle.resnets[0])
    for index, (attention, resnet) in enumerate(
        zip(middle.attentions, middle.resnets[1:], strict=True)
    ):
        if attention is not None:
            stages.append(_attention(f"mid_block.attentions.{index}", attention))
        stages += _resnet_stages(f"mid_block.resnets.{index + 1}", resnet)
    for index, block in enumerate(decoder.up_blocks):
        stages += _up_block_stages(f"up_blocks.{index}", block)
    stages.append(
        NormConv(
            name="conv_out",
            norm=decoder.conv_norm_out,
            activation=decoder.conv_act,
            conv=decoder.conv_out,
        )
    )
    return stages


def _up_block_stages(name: str, block: Any) -> list[Stage]:
    kind = type(block).__name__
    if kind not in {"UpDecoderBlock2D", "AttnUpDecoderBlock2D"}:
        raise ConfigurationError(
            f"{name} of the VAE's decoder is a {kind}; UpDecoderBlock2D and AttnUpDecoderBlock2D "
            "are the ones that can be decoded in chunks"
        )
    stages: list[Stage] = []
    for index, resnet in enumerate(block.resnets):
        stages += _resnet_stages(f"{name}.resnets.{index}", resnet)
        if kind == "AttnUpDecoderBlock2D":
            stages.append(_attention(f"{name}.attentions.{index}", block.attentions[index]))
    for index, upsampler in enumerate(block.upsamplers or ()):
        stages.append(
            Upsample(name=f"{name}.upsamplers.{index}", module=upsampler, conv=upsampler.conv)
        )
    return stages


def _attention(name: str, module: Any) -> Attention:
    return Attention(name=name, channels=module.to_q.in_features, module=module)


def _resnet_stages(name: str, resnet: Any) -> list[Stage]:
    if type(resnet).__name__ != "ResnetBlock2D" or resnet.time_emb_proj is not None:
        raise ConfigurationError(
            f"{name} of the VAE's decoder must be a ResnetBlock2D without a time embedding "
            "to be decoded in chunks"
        )
    return [
        NormConv(
            name=f"{name}.conv1",
            norm=resnet.norm1,
            activation=resnet.nonlinearity,
            conv=resnet.conv1,
            shortcut=resnet.conv_shortcut,
            opens_residual=True,
        ),
        NormConv(
            name=f"{name}.conv2",
            norm=resnet.norm2,
            activation=resnet.nonlinearity,
            conv=resnet.conv2,
            closes_residual=True,
            divisor=resnet.output_scale_factor,
        ),
    ]
