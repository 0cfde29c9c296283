"""Masks of flukes: run lengths in text, and the part of a mask that belongs to a crop."""

from pathlib import Path

import numpy as np
from PIL import Image

from whalelib.data.images import Box, photograph_size, read_image

MASK_SIZE = (192, 384)  # (H, W) in which the first solution kept its masks, whatever the photograph's shape


def encode_rle(mask: np.ndarray) -> str:
    """Return a mask (H, W) as run lengths: "start length start length ...", counted from 1 down the columns.

    The empty mask is the empty text. This is Kaggle's code for masks, which the first solution used.
    """
    flat = np.concatenate([[False], np.asarray(mask, dtype=bool).ravel(order="F"), [False]])
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = edges.reshape(-1, 2)
    return " ".join(f"{start} {end - start}" for start, end in runs)


def decode_rle(text: str, shape: tuple[int, int] = MASK_SIZE) -> np.ndarray:
    """Return the mask (H, W) bool that :func:`encode_rle` wrote.

    Raises:
        ValueError: no list of pairs of whole numbers, or runs that overlap or leave the mask.
    """
    words = text.split()
    if not all(word.isdecimal() for word in words) or len(words) % 2:
        raise ValueError(f"run lengths {text[:40]!r}: not pairs of whole numbers")
    runs = np.array(words, dtype=np.int64).reshape(-1, 2)
    starts, ends = runs[:, 0] - 1, runs.sum(axis=1) - 1
    pixels = shape[0] * shape[1]
    if len(runs) and (starts[0] < 0 or ends[-1] > pixels or (runs[:, 1] < 1).any()):
        raise ValueError(f"run lengths {text[:40]!r}: beyond the {shape[0]} x {shape[1]} pixels of the mask")
    if (starts[1:] < ends[:-1]).any():
        raise ValueError(f"run lengths {text[:40]!r}: not in order, or they overlap")
    steps = np.zeros(pixels + 1, dtype=np.int8)
    np.add.at(steps, starts, 1)
    np.add.at(steps, ends, -1)
    return np.cumsum(steps[:-1]).astype(bool).reshape(shape, order="F")


def mask_pixels(
    mask: np.ndarray | Path | str, path: str, box: Box | None, size: tuple[int, int]
) -> np.ndarray:
    """Return the part of a photograph's mask that lies in a box, resized as the photograph is.

    The edges come out grey (bilinear), as the first solution's did.

    Args:
        mask: of the whole photograph, at any size: (H, W) uint8 or bool, the Path of a picture, or run lengths.
        path: of the photograph, whose pixels the box is in.
        box: x0, y0, x1, y1, or None for the whole.
        size: (H, W) of the result.

    Returns:
        (H, W) uint8, 255 on the fluke.
    """
    if isinstance(mask, Path):
        mask = read_image(mask, mode="L")
    elif isinstance(mask, str):
        mask = decode_rle(mask)
    mask = np.asarray(mask)
    picture = Image.fromarray(mask.astype(np.uint8) * 255 if mask.dtype == bool else mask)
    if box is None:
        part = (0, 0, picture.width, picture.height)
    else:
        height, width = photograph_size(path)
        across, down = picture.width / width, picture.height / height
        part = (
            max(box[0], 0) * across,
            max(box[1], 0) * down,
            min(box[2], width) * across,
            min(box[3], height) * down,
        )
    return np.array(picture.resize(size[::-1], Image.Resampling.BILINEAR, box=part))
