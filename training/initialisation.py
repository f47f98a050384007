"""How the networks start, so that little has to be unlearned."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTextModel

WORD_STD = 0.3
POSITION_STD = 0.002
VALUE_GAIN = 3.0
LINKS = ("conv_shortcut", "decoder.conv_in", "encoder.conv_out", "quant_conv")


@torch.no_grad()
def start_near_identity(model: nn.Module, *, branch_gain: float) -> None:
    """Shrink residual branches by `branch_gain`; let the layers between them pass signals on.

    The convolutions that change resolution or width become an orthogonal map of each pixel (the
    delta-orthogonal start of Xiao et al. 2018) beside half of their usual weights. With it the
    autoencoder learns in a hundred steps what else took it a thousand.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        if name.endswith("conv2"):
            layer.weight *= branch_gain
        elif "sampler" in name or name.endswith(LINKS):
            middle = layer.kernel_size[0] // 2
            layer.weight *= 0.5
            shape = layer.weight.shape[:2]
            layer.weight[:, :, middle, middle] += nn.init.orthogonal_(torch.empty(shape))


@torch.no_grad()
def start_with_distinct_words(text_encoder: CLIPTextModel, silent_tokens: list[int]) -> None:
    """Let captions differ from the first step on.

    With the usual start most of a short caption's embedding is what all captions share: positions
    and padding. Here those are (nearly) silent, and attention passes the words on at full rank.
    """
    model = getattr(text_encoder, "text_model", text_encoder)
    words = model.embeddings.token_embedding.weight
    words.normal_(0, WORD_STD)
    words[silent_tokens] = 0
    model.embeddings.position_embedding.weight.normal_(0, POSITION_STD)
    for layer in model.encoder.layers:
        nn.init.orthogonal_(layer.self_attn.v_proj.weight, gain=VALUE_GAIN)
        nn.init.orthogonal_(layer.self_attn.out_proj.weight)
