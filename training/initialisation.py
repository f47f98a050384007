"""How the networks start, so that little has to be unlearned."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import TextTimeEmbedding
from torch import Tensor, nn
from transformers import CLIPTextModel

WORD_STD = 0.3
POSITION_STD = 0.002
VALUE_GAIN = 3.0
RIDGE = 1e-2
CAPTIONS_AT_ONCE = 512
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


@torch.no_grad()
def start_with_distinct_captions(
    text_encoder: CLIPTextModel,
    embedding: TextTimeEmbedding,
    *,
    token_ids: Tensor,
    labels: Tensor,
) -> None:
    """Let the pooled embedding tell pictures apart, and little else.

    A linear discriminant analysis: `embedding`'s projection whitens the pooled text, and shrinks
    each direction, as a Wiener filter does, by the share of it that differs from picture to picture
    rather than among captions of the same one.

    Args:
        text_encoder: Whose hidden states are pooled.
        embedding: Whose projection is set.
        token_ids: (N, tokens), of several captions of each picture.
        labels: (N,), the pictures' numbers, from 0 on without a gap.
    """
    pooled = torch.cat(
        [
            embedding.pool(embedding.norm1(text_encoder(part)[0]))
            for part in torch.split(token_ids, CAPTIONS_AT_ONCE)
        ]
    )
    mean = pooled.mean(dim=0)
    pooled = pooled - mean
    counts = labels.bincount().unsqueeze(1)
    centres = torch.zeros(len(counts), pooled.shape[1]).index_add_(0, labels, pooled) / counts
    within = (pooled - centres[labels]).T.cov(correction=0)
    within += RIDGE * within.diagonal().mean() * torch.eye(len(within))
    unmix = torch.linalg.inv(torch.linalg.cholesky(within))
    ratios, directions = torch.linalg.eigh(unmix @ centres.T.cov(correction=0) @ unmix.T)
    ratios = ratios.clamp(min=0)
    gains = ratios / (ratios + 1) ** 1.5
    whitening = gains.unsqueeze(1) * (directions.T @ unmix)
    shape = embedding.proj.weight.shape
    spread = torch.linalg.qr(torch.randn(max(shape), min(shape))).Q
    projection = (spread if shape[0] >= shape[1] else spread.T) @ whitening
    embedding.proj.weight.copy_(projection)
    embedding.proj.bias.copy_(-projection @ mean)
