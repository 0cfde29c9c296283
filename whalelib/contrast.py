"""Contrast normalisation: the same picture in any light, or so one hopes.

What the report's authors tried after it, inside the second solution's network and in place of ImageNet's mean and
deviation (notebook 06_04). Images are (..., 3, H, W) float tensors, RGB, 0 to 1, each treated by itself.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import avg_pool2d

LEAST = 1e-8  # that is divided by: an image of one colour comes out black


def global_contrast(images: torch.Tensor, bias: float = 0.0) -> torch.Tensor:
    """Return images with mean 0 and, without bias, deviation 1, over all pixels and channels of each.

    Args:
        images: (..., C, H, W) floats.
        bias: added to the variance before its root is taken (lambda), from 0 up; the authors' 0.

    Returns:
        (..., C, H, W).

    Raises:
        ValueError: no floats, fewer than three dimensions, or a bias below 0.
    """
    _check(images, bias)
    return _normalised(images, lambda values: values.mean(dim=(-3, -2, -1), keepdim=True), bias)


def local_contrast(images: torch.Tensor, size: int = 9, bias: float = 1.0) -> torch.Tensor:
    """Return images less the mean about each pixel, over the deviation about it.

    Both are taken over a square of pixels and all channels. Beyond the edge all is 0 and counts: a border as wide as
    half the square comes out too bright. The variance is that of the image less its local means, each pixel its own.

    Args:
        images: (..., C, H, W) floats.
        size: pixels along the square, odd.
        bias: added to the variance (lambda), from 0 up; the authors' 1, beside which the variance of pixels from 0
            to 1 counts for little.

    Returns:
        (..., C, H, W).

    Raises:
        ValueError: as ``global_contrast``; or a size that is even or below 1.
    """
    _check(images, bias)
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size = {size}: give an odd number of pixels, so that one is in the middle")
    return _normalised(images, lambda values: _box_mean(values, size), bias)


class Contrasted(nn.Module):
    """A backbone behind a contrast normalisation.

    For an ``Identifier`` with ``mean=0, std=1``, which then adds none of its own.

    Args:
        backbone: a module from images to pooled features, with ``num_features``.
        contrast: from images (N, 3, H, W) to images.
    """

    def __init__(self, backbone: nn.Module, contrast: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.backbone, self.contrast = backbone, contrast
        self.num_features = backbone.num_features

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (N, F) of images (N, 3, H, W)."""
        return self.backbone(self.contrast(images))


def _normalised(images: torch.Tensor, mean: Callable, bias: float) -> torch.Tensor:
    centred = images - mean(images)
    return centred / (mean(centred.square()) + bias).sqrt().clamp(min=LEAST)


def _box_mean(images: torch.Tensor, size: int) -> torch.Tensor:
    """Return (..., 1, H, W): the mean over a square about each pixel and all channels, 0 beyond the edge."""
    gray = images.mean(dim=-3, keepdim=True)
    pooled = avg_pool2d(gray.reshape(-1, 1, *gray.shape[-2:]), size, stride=1, padding=size // 2)
    return pooled.reshape(gray.shape)


def _check(images: torch.Tensor, bias: float) -> None:
    if not images.is_floating_point() or images.ndim < 3:
        raise ValueError(f"images of shape {tuple(images.shape)}, {images.dtype}: give (..., C, H, W) floats")
    if not bias >= 0:
        raise ValueError(f"bias = {bias}: give a number from 0 up")
