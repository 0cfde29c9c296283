"""Photographs as a network reads them: one size, one range, random draws that can be repeated."""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from whalelib.augment import augmented
from whalelib.data.images import read_image
from whalelib.data.masks import mask_pixels
from whalelib.files import locked, replacing

if TYPE_CHECKING:
    from whalelib.data.catalog import Catalog

CROPS = (None, "box")


class Photographs(Dataset):
    """The photographs of a catalog as a dataset for PyTorch.

    Item i is a dict: ``image`` (3, H, W) float32 RGB, 0 to 1, with masks (4, H, W); ``label`` the identity's
    place in ``known``, or -1 for ``new_whale``, for an identity not in ``known`` and for none; ``index`` = i.
    A random draw for item i in an epoch depends on (seed, epoch, i) alone, whatever the order, the batch or
    the worker.

    Args:
        catalog: what to read.
        size: (H, W) in pixels, whatever the photograph's shape (as the solutions do).
        transform: an albumentations pipeline on the resized image, or None.
        seed: of the draws, from 0 up.
        crop: None for the whole photograph, "box" for its box (a row without one: the whole photograph).
        masks: with the mask as a fourth channel (section 3.1.1): from the catalog's column ``mask`` (path of a
            picture) or else ``rle`` (run lengths at ``MASK_SIZE``), and zeros for a photograph without one.
        known: identities in the order of the labels; default ``catalog.known``. Give the training catalog's
            to others.
        memory: decode all photographs when the first is asked for and keep them, H * W * 3 bytes each; else decode at
            each use.
        folder: keep them in a file there too, for the next run to map instead of decoding. Processes that load share
            it; without it each of them decodes all for itself.

    Raises:
        ValueError: an argument is not one of the choices, or boxes or masks are wanted and there are none.
        PhotographError: a photograph that can't be read, by its path; in memory, when the first item is asked for.
        OSError: the file in ``folder`` can't be written.
    """

    def __init__(
        self,
        catalog: "Catalog",
        size: tuple[int, int],
        *,
        transform=None,
        seed: int = 0,
        crop: str | None = None,
        masks: bool = False,
        known: list[str] | None = None,
        memory: bool = True,
        folder: Path | None = None,
    ):
        if crop not in CROPS:
            raise ValueError(f"crop = {crop!r}: choose one of {CROPS}")
        if crop == "box" and "x0" not in catalog.table:
            raise ValueError(f"crop = 'box', but the catalog {catalog.name} has no boxes")
        if masks and not {"mask", "rle"} & {*catalog.table}:
            raise ValueError(f"masks = True, but the catalog {catalog.name} has no masks")
        height, width = size
        if height < 1 or width < 1:
            raise ValueError(f"size = {size!r}: give (H, W) in pixels")
        if seed < 0:
            raise ValueError(f"seed = {seed}: give a whole number from 0 up")
        self.catalog, self.size, self.crop = catalog, (int(height), int(width)), crop
        self.transform, self.seed, self.epoch = transform, seed, 0
        self.known = list(catalog.known if known is None else known)
        self.labels = labels_of(catalog.table["identity"], self.known)
        self._paths = catalog.table["path"].tolist()
        self._boxes = [None] * len(self._paths)
        if crop == "box":
            boxes = catalog.table[["x0", "y0", "x1", "y1"]].to_numpy(dtype=float)
            self._boxes = [None if np.isnan(box).any() else tuple(box) for box in boxes]
        self._masks = _masks(catalog.table) if masks else None
        self._memory = memory
        self._pixels = [] if folder is None else [self._on_disk(Path(folder))]  # of all; copies share it

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return item ``index`` as the class says."""
        index = range(len(self))[index]  # also from the end; beyond it an IndexError
        image = self.pixels(index)
        if self.transform is not None:
            image = transformed(self.transform, (self.seed, self.epoch, index), image)
        return {"image": as_tensor(image), "label": int(self.labels[index]), "index": index}

    def pixels(self, index: int) -> np.ndarray:
        """Return the photograph, cropped and resized only: (H, W, 3) uint8 RGB, with masks (H, W, 4)."""
        if self._memory and not self._pixels:
            self._pixels.append(self._decoded(np.empty((len(self), *self._shape), dtype=np.uint8)))
        return np.array(self._pixels[0][index]) if self._pixels else self._read(index)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, whose draws the items show."""
        self.epoch = epoch

    def plain(self) -> "Photographs":
        """Return the same photographs without augmentation; what was decoded is shared."""
        other = copy(self)
        other.transform = None
        return other

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the items."""
        transform = None if self.transform is None else self.transform.to_dict()
        parts = [self._pixels_key, transform, self.seed, self.known]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    @property
    def _pixels_key(self) -> str:
        parts = [self.catalog.fingerprint, self.size, self.crop, self._masks is not None]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _read(self, index: int) -> np.ndarray:
        path, box = self._paths[index], self._boxes[index]
        image = read_image(path, size=self.size, box=box)
        if self._masks is None:
            return image
        mask = self._masks[index]
        channel = np.zeros(self.size, np.uint8) if mask is None else mask_pixels(mask, path, box, self.size)
        return np.dstack([image, channel])

    @property
    def _shape(self) -> tuple[int, int, int]:
        return (*self.size, 3 if self._masks is None else 4)

    def _decoded(self, out: np.ndarray) -> np.ndarray:
        def fill(index: int) -> None:
            out[index] = self._read(index)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
            for _ in tqdm(pool.map(fill, range(len(self))), "Reading photographs", len(self), leave=False):
                pass
        return out

    def _on_disk(self, folder: Path) -> np.ndarray:
        path, shape = folder / f"photographs-{self._pixels_key}.npy", (len(self), *self._shape)
        if not _holds(path, shape):
            # Another process may have made it while this one waited.
            with locked(folder):
                if not _holds(path, shape):
                    with replacing(path) as part:
                        pixels = np.lib.format.open_memmap(part, "w+", np.uint8, shape)
                        _take_room(part)
                        self._decoded(pixels).flush()
        return np.load(path, mmap_mode="r")


def _holds(path: Path, shape: tuple[int, ...]) -> bool:
    """Return whether a file is there and whole: what is damaged is made anew."""
    try:
        pixels = np.load(path, mmap_mode="r")
    except Exception:  # NumPy raises all kinds on damaged files
        return False
    return pixels.shape == shape and pixels.dtype == np.uint8


def _take_room(path: Path) -> None:
    """Ask for the room of a file that is to be filled as mapped: there a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):  # not everywhere
        with path.open("rb+") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def labels_of(identity: pd.Series, known: Sequence[str]) -> np.ndarray:
    """Return the place in ``known`` of each identity, (N,) int64; -1 where it has none."""
    place = {name: number for number, name in enumerate(known)}
    return identity.map(place).fillna(-1).to_numpy(dtype=np.int64)


def transformed(transform, key: tuple[int, ...], pixels: np.ndarray) -> np.ndarray:
    """Return pixels (H, W, 3 or 4) after an albumentations pipeline; a fourth channel moves as their mask."""
    if pixels.shape[2] == 3:
        return augmented(transform, key, image=pixels)["image"]
    # OpenCV parts and joins channels fifteen times as fast as NumPy.
    image, mask = cv2.cvtColor(pixels, cv2.COLOR_RGBA2RGB), cv2.extractChannel(pixels, 3)
    changed = augmented(transform, key, image=image, mask=mask)
    joined = cv2.cvtColor(changed["image"], cv2.COLOR_RGB2RGBA)
    cv2.insertChannel(changed["mask"], joined, 3)
    return joined


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """Return pixels (H, W, C), uint8 or float, as a tensor (C, H, W) float32, 0 to 1."""
    tensor = torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1))).float()
    return tensor.div_(255) if pixels.dtype == np.uint8 else tensor


def _masks(table) -> list[Path | str | None]:
    """Return each photograph's mask: the path in the column ``mask``, or the run lengths in ``rle``."""
    masks = [None] * len(table)
    for column, kind in (("rle", str), ("mask", Path)):
        if column in table:
            masks = [
                kind(new) if isinstance(new, str) else old
                for new, old in zip(table[column], masks, strict=True)
            ]
    return masks
