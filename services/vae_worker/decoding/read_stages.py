"""Reads the stages of a decode off a diffusers VAE."""

from __future__ import annotations

from math import prod
from typing import Any, cast

from torch import nn

from services.vae_worker.decoding.stages import (
    Attention,
    NormConv,
    Stage,
    Stem,
    TinyLayers,
    Upsample,
)
from shared.errors import ConfigurationError


def read_stages(vae: Any) -> list[Stage]:
    """Return the stages of a VAE's decode, in the order in which they run.

    Args:
        vae: A diffusers `AutoencoderKL` or `AutoencoderTiny`.

    Raises:
        ConfigurationError: The decoder has a block that this module can't take apart.
    """
    return _tiny_stages(vae) if type(vae).__name__ == "AutoencoderTiny" else _kl_stages(vae)


def _kl_stages(vae: Any) -> list[Stage]:
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


def _tiny_stages(vae: Any) -> list[Stage]:
    first, *layers = vae.decoder.layers
    groups: list[list[nn.Module]] = [[]]
    for layer in layers:
        groups[-1].append(layer)
        if next(layer.parameters(), None) is not None:
            groups.append([])
    assert not groups.pop(), "a decoder ends with a convolution"
    stem = Stem(
        name="layers.0",
        scaling_factor=vae.config.scaling_factor,
        shift_factor=vae.config.shift_factor or 0.0,
        post_quant_conv=None,
        conv_in=first,
        is_bounded=True,
    )
    return [
        stem,
        *(
            TinyLayers(
                name=f"layers.{number}",
                layers=tuple(group),
                enlarges=prod(_scale_of(layer) for layer in group),
                is_last=number == len(groups),
            )
            for number, group in enumerate(groups, start=1)
        ),
    ]


def _scale_of(layer: nn.Module) -> int:
    return int(cast("float", layer.scale_factor)) if isinstance(layer, nn.Upsample) else 1
