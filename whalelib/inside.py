"""What a network looks at, and how its embeddings lie: heat maps with their test, and a flat map with its error.

Not in the report. Sources: Grad-CAM, Selvaraju et al. 2017; cell by cell, Draelos and Carin 2020 (HiResCAM); integrated
gradients, Sundararajan et al. 2017; the test by deletion, Petsiuk et al. 2018 (RISE); t-SNE, van der Maaten and Hinton
2008.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from whalelib.train import evaluating

WAYS = ("cells", "pooled")


def grad_cam(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    layer: nn.Module | None = None,
    by: str = "cells",
    batch_size: int = 32,
) -> torch.Tensor:
    """Return what each cell of a feature map adds to the cosine of an image's embedding and a target.

    The map times the gradient, summed over the channels. The embedding's length is taken for fixed, so a cell counts
    for what it adds along the target. Where all is linear that follows the layer, as after the last map of the three
    solutions' networks, the cells and a constant add up to the cosine exactly; elsewhere see :func:`integrated_cam`.

    Args:
        model: has ``embed(images) -> (N, D)``, ``backbone`` and ``neck``, whose output becomes the embedding by being
            made as long as 1. It runs in evaluation mode and is left as it was.
        images: (N, C, H, W), on the model's device.
        targets: (N, D), rows of length 1.
        layer: part of the model whose output (N, F, h, w) is the map; default the backbone.
        by: "cells": each with its own gradient; "pooled": with the gradient's mean over all cells, as Grad-CAM is
            defined, which forgets where in the picture a feature counts.
        batch_size: images at a time.

    Returns:
        (N, h, w), with negative values, where Grad-CAM's pictures show the positive ones only.

    Raises:
        ValueError: another number of targets than of images, or another ``by``.
    """
    if by not in WAYS:
        raise ValueError(f"by = {by!r}: choose one of {', '.join(WAYS)}")
    heat = []
    for some, target in _batches(images, targets, batch_size):
        with _seen(model, layer) as seen, torch.enable_grad():
            model.embed(some.detach().requires_grad_())  # or a frozen network's map would have no gradient
            along = seen["long"] / seen["long"].detach().norm(dim=1, keepdim=True) * target
            (slope,) = torch.autograd.grad(along.sum(), seen["map"])
        if by == "pooled":
            slope = slope.mean((2, 3), keepdim=True)
        heat.append((slope * seen["map"]).sum(1).detach())
    return torch.cat(heat)


def integrated_cam(
    model: nn.Module,
    images: torch.Tensor,
    targets: torch.Tensor,
    *,
    layer: nn.Module | None = None,
    steps: int = 8,
    batch_size: int = 32,
) -> torch.Tensor:
    """Return what each cell of a feature map adds to the cosine, counted from the map of a blank image.

    The cosine's gradient is averaged over the straight way from the map that an image of the mean colour has to the
    image's own, and multiplied by the difference of the two. The cells add up to the image's cosine less the blank
    one's, the more exactly the more steps, whatever follows the layer.

    Args:
        model, images, targets, layer, batch_size: as of :func:`grad_cam`.
        steps: of the way.

    Returns:
        (N, h, w).

    Raises:
        ValueError: another number of targets than of images, or no steps.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: give a whole number from 1 up")
    heat = []
    for some, target in _batches(images, targets, batch_size):
        ends = []
        for image in (some.mean((2, 3), keepdim=True).expand_as(some), some):
            with _seen(model, layer) as seen, torch.no_grad():
                model.embed(image.contiguous())
            ends.append(seen["map"].clone())
        start, way, total = ends[0], ends[1] - ends[0], 0
        for step in range(steps):
            place = (start + way * (step + 0.5) / steps).requires_grad_()
            with _seen(model, layer, instead=place), torch.enable_grad():
                cosine = (F.normalize(model.embed(some)) * target).sum()
            total = total + torch.autograd.grad(cosine, place)[0]
        heat.append((total / steps * way).sum(1))
    return torch.cat(heat)


def _batches(
    images: torch.Tensor, targets: torch.Tensor, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    if len(images) != len(targets):
        raise ValueError(f"{len(images)} images, {len(targets)} targets")
    return zip(images.split(size), targets.split(size), strict=True)


@contextmanager
def _seen(model: nn.Module, layer: nn.Module | None, instead: torch.Tensor | None = None) -> Iterator[dict]:
    """Put the model into evaluation mode, and note what a layer ("map") and the neck ("long") put out.

    instead: what the layer is to put out.
    """
    seen = {}

    def note(name: str, output: torch.Tensor) -> torch.Tensor | None:
        seen[name] = output
        return instead if name == "map" else None

    parts = {"map": model.backbone if layer is None else layer, "long": model.neck}
    hooks = [
        part.register_forward_hook(lambda _, given, output, name=name: note(name, output))
        for name, part in parts.items()
    ]
    try:
        with evaluating(model):
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def heat_share(heat: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which share of the positive heat lies on masks, and which share of the area they are: (N,) each.

    Heat that knows nothing of the mask has, on average, the area's share.

    Args:
        heat: (N, h, w); a cell that the mask covers in part counts in part.
        masks: (N, H, W) from 0 to 1, or booleans; H and W are multiples of h and w.

    Returns:
        Both from 0 to 1; the first is NaN where no cell is positive.

    Raises:
        ValueError: shapes that don't fit.
    """
    if (
        masks.ndim != 3
        or len(masks) != len(heat)
        or any(m % n for m, n in zip(masks.shape, heat.shape, strict=True))
    ):
        raise ValueError(f"heat of shape {tuple(heat.shape)}, masks of shape {tuple(masks.shape)}")
    covered = F.adaptive_avg_pool2d(masks[:, None].float(), heat.shape[1:])[:, 0]
    positive = heat.clamp(min=0)
    return (positive * covered).sum((1, 2)) / positive.sum((1, 2)), covered.mean((1, 2))


def blanked(images: torch.Tensor, heat: torch.Tensor, share: float = 0.1, grid: int = 8) -> torch.Tensor:
    """Return images whose hottest cells have the image's mean colour: the test by deletion.

    Args:
        images: (N, C, H, W).
        heat: (N, h, w), of any size; brought to the grid (bilinear) first.
        share: of the cells to blank, rounded to whole cells, at least one.
        grid: cells a side; H and W are multiples of it.

    Raises:
        ValueError: sides that are no multiples of the grid, or a share outside 0 to 1.
    """
    height, width = images.shape[2:]
    if height % grid or width % grid:
        raise ValueError(f"images of {height} x {width} pixels can't be cut into {grid} x {grid} cells")
    if not 0 < share <= 1:
        raise ValueError(f"share = {share}: give a share above 0, up to 1")
    cells = F.interpolate(heat[:, None].float(), (grid, grid), mode="bilinear", align_corners=False).flatten(
        1
    )
    hottest = cells.argsort(dim=1, descending=True, stable=True)[:, : max(1, round(share * grid**2))]
    gone = torch.zeros_like(cells).scatter_(1, hottest, 1).reshape(-1, 1, grid, grid)
    gone = gone.repeat_interleave(height // grid, 2).repeat_interleave(width // grid, 3)
    return torch.where(gone > 0, images.mean((2, 3), keepdim=True), images)


def neighbour_map(rows: np.ndarray, perplexity: float = 30, steps: int = 500) -> np.ndarray:
    """Return a flat map (N, 2) on which near points stay near: t-SNE, exact, without random draws.

    It begins with the two principal components. Time and memory grow with N squared: for some thousand rows.

    Args:
        rows: (N, D).
        perplexity: about how many neighbours of each point count; less than N - 1.
        steps: of descent; the first quarter with the attraction twelve times as strong.

    Raises:
        ValueError: a perplexity that so few rows can't have.
    """
    count = len(rows)
    if not 1 <= perplexity < count - 1:
        raise ValueError(
            f"perplexity = {perplexity} for {count} rows: give a number from 1 to less than {count - 1}"
        )
    wanted = _affinities(torch.as_tensor(rows, dtype=torch.float32), perplexity)
    flat = torch.as_tensor(principal(rows)[0], dtype=torch.float32)
    flat = 1e-4 * flat / flat[:, 0].std()
    speed, gains = torch.zeros_like(flat), torch.ones_like(flat)
    rate = max(count / 48, 50.0)
    for step in range(steps):
        early = step < steps // 4
        near = 1 / (1 + torch.cdist(flat, flat).square())
        near.fill_diagonal_(0)
        pull = ((12 if early else 1) * wanted - near / near.sum()) * near
        slope = 4 * (pull.sum(1, keepdim=True) * flat - pull @ flat)
        gains = torch.where(slope.sign() != speed.sign(), gains + 0.2, gains * 0.8).clamp(min=0.01)
        speed = (0.5 if early else 0.8) * speed - rate * gains * slope
        flat = flat + speed
    return (flat - flat.mean(0)).numpy()


def _affinities(rows: torch.Tensor, perplexity: float) -> torch.Tensor:
    """Return t-SNE's joint probabilities (N, N); each row's width, found by halving, gives it the perplexity."""
    squared = torch.cdist(rows, rows).square()
    squared = squared / squared.mean()
    squared.fill_diagonal_(torch.inf)
    low, high = (torch.full((len(rows), 1), end) for end in (-10.0, 20.0))
    for _ in range(40):
        middle = (low + high) / 2
        share = torch.softmax(-squared * middle.exp(), 1)
        wide = torch.special.entr(share).sum(1, keepdim=True) > np.log(perplexity)
        low, high = torch.where(wide, middle, low), torch.where(wide, high, middle)
    return (share + share.T) / (2 * len(rows))


def principal(rows: np.ndarray, count: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Return the principal components (N, count) of rows (N, D), and the share of the variance that each has (count,).

    Of each component's two signs that is taken with which its largest weight is positive.
    """
    centred = np.asarray(rows, dtype=float) - np.mean(rows, axis=0)
    _, lengths, axes = np.linalg.svd(centred, full_matrices=False)
    axes = axes[:count] * np.sign(
        np.take_along_axis(axes[:count], np.abs(axes[:count]).argmax(1)[:, None], 1)
    )
    return centred @ axes.T, lengths[:count] ** 2 / (lengths**2).sum()


def neighbours_kept(rows: np.ndarray, flat: np.ndarray, count: int = 10) -> np.ndarray:
    """Return which share of each row's nearest rows (N, D) are also among its nearest on a map (N, 2): (N,).

    By chance it would be count / (N - 1).

    Raises:
        ValueError: other lengths, or no more rows than neighbours.
    """
    if len(rows) != len(flat) or not 1 <= count < len(rows):
        raise ValueError(f"{len(rows)} rows, {len(flat)} points, {count} neighbours")
    nearest = []
    for part in (rows, flat):
        apart = torch.cdist(*[torch.as_tensor(np.asarray(part, dtype=float))] * 2).fill_diagonal_(torch.inf)
        nearest.append(apart.argsort(dim=1, stable=True)[:, :count].numpy())
    return (nearest[0][:, :, None] == nearest[1][:, None]).any(2).mean(1)
