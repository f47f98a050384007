"""How far a picture is from another, in four ways; pictures are (N, 3, height, width) in [0, 1].

Written from the papers' formulas, since a benchmark's figures should not move with a library's
version. LPIPS needs weights of a classifier that are not ours to ship; GMSD stands in for it: a
published perceptual measure without any weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

MAX_PSNR_DB = 60.0
"""Equal pictures count as this far apart, so that a mean stays finite."""

BACKGROUND_TOLERANCE = 0.05
"""A pixel is background where every channel of both pictures is within this of white."""

_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
_SSIM_WINDOW, _SSIM_SIGMA = 11, 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2
_GMSD_C = 170 / 255**2


def psnr_db(pictures: Tensor, references: Tensor) -> Tensor:
    """Return 10 log10(1 / mean squared error) by picture, (N,), at most `MAX_PSNR_DB`."""
    return _psnr_db((pictures - references).square().flatten(1).mean(dim=1))


def foreground_psnr_db(pictures: Tensor, references: Tensor) -> Tensor:
    """Return the PSNR of the pixels that are not white in both pictures, which would flatter."""
    background = torch.minimum(pictures, references).amin(dim=1) >= 1 - BACKGROUND_TOLERANCE
    errors = (pictures - references).square().mean(dim=1)
    errors = errors.masked_fill(background, 0.0).flatten(1).sum(dim=1)
    return _psnr_db(errors / (~background).flatten(1).sum(dim=1).clamp(min=1))


def ssim(pictures: Tensor, references: Tensor) -> Tensor:
    """Return the mean structural similarity of the luma, (N,): Wang et al. 2004, equation 13.

    Gaussian windows of 11 pixels with a standard deviation of 1.5, only those inside the picture.
    """
    offsets = torch.arange(_SSIM_WINDOW) - _SSIM_WINDOW // 2
    weights = torch.exp(-offsets.square() / (2 * _SSIM_SIGMA**2))
    kernel = torch.outer(weights, weights)
    kernel = (kernel / kernel.sum()).view(1, 1, _SSIM_WINDOW, _SSIM_WINDOW)

    def local_mean(values: Tensor) -> Tensor:
        return functional.conv2d(values, kernel.to(values))

    x, y = _luma(pictures), _luma(references)
    mean_x, mean_y = local_mean(x), local_mean(y)
    variance_x = local_mean(x * x) - mean_x.square()
    variance_y = local_mean(y * y) - mean_y.square()
    covariance = local_mean(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + _SSIM_C1) * (2 * covariance + _SSIM_C2)) / (
        (mean_x.square() + mean_y.square() + _SSIM_C1) * (variance_x + variance_y + _SSIM_C2)
    )
    return similarity.flatten(1).mean(dim=1)


def gmsd(pictures: Tensor, references: Tensor) -> Tensor:
    """Return the gradient magnitude similarity deviation of the luma, (N,); 0 for equal ones.

    Xue, Zhang, Mou, Bovik 2013, equations 3 to 6: the luma halved, Prewitt gradients, and the
    standard deviation of their similarity over the picture.
    """
    prewitt = torch.tensor([[1.0, 0.0, -1.0]] * 3) / 3
    kernels = torch.stack([prewitt, prewitt.T])[:, None]

    def gradient(values: Tensor) -> Tensor:
        halved = functional.avg_pool2d(_luma(values), 2)
        return functional.conv2d(halved, kernels.to(halved)).square().sum(dim=1).sqrt()

    x, y = gradient(pictures), gradient(references)
    similarity = (2 * x * y + _GMSD_C) / (x.square() + y.square() + _GMSD_C)
    return similarity.flatten(1).std(dim=1, correction=0)


def _psnr_db(mean_squared_errors: Tensor) -> Tensor:
    return (-10 * mean_squared_errors.log10()).clamp(max=MAX_PSNR_DB)


def _luma(pictures: Tensor) -> Tensor:
    weights = pictures.new_tensor(_LUMA).view(1, 3, 1, 1)
    return (pictures * weights).sum(dim=1, keepdim=True)
