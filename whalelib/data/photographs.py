"""Photographs as a network reads them: one size, one range, random draws that can be repeated."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from whalelib.augment import augmented
from whalelib.data.images import read_image
from whalelib.files import replacing

if TYPE_CHECKING:
    from whalelib.data.catalog import Catalog

CROPS = (None, "box")


class Photographs(Dataset):
    """The photographs of a catalog as a dataset for PyTorch.

    Item i is a dict: ``image`` (3, H, W) float32 RGB, 0 to 1; ``label`` the identity's place in ``known``, or
    -1 for ``new_whale``, for an identity not in ``known`` and for none; ``index`` = i. A random draw for item
    i in an epoch depends on (seed, epoch, i) alone, whatever the order, the batch or the worker.

    Args:
        catalog: what to read.
        size: (H, W) in pixels, whatever the photograph's shape (as the solutions do).
        transform: an albumentations pipeline on the resized image, or None.
        seed: of the draws, from 0 up.
        crop: None for the whole photograph, "box" for its box (a row without one: the whole photograph).
        known: identities in the order of the labels; default ``catalog.known``. Give the training catalog's
            to others.
        memory: decode each photograph once and keep it, H * W * 3 bytes each; else decode at each use.
        folder: keep them in a file there too, for the next run to map instead of decoding.

    Raises:
        ValueError: an argument is not one of the choices, or boxes are wanted and there are none.
        PhotographError: a photograph that can't be read, by its path.
    """

    def __init__(
        self,
        catalog: "Catalog",
        size: tuple[int, int],
        *,
        transform=None,
        seed: int = 0,
        crop: str | None = None,
        known: list[str] | None = None,
        memory: bool = True,
        folder: Path | None = None,
    ):
        if crop not in CROPS:
            raise ValueError(f"crop = {crop!r}: choose one of {CROPS}")
        if crop == "box" and "x0" not in catalog.table:
            raise ValueError(f"crop = 'box', but the catalog {catalog.name} has no boxes")
        height, width = size
        if height < 1 or width < 1:
            raise ValueError(f"size = {size!r}: give (H, W) in pixels")
        if seed < 0:
            raise ValueError(f"seed = {seed}: give a whole number from 0 up")
        self.catalog, self.size, self.crop = catalog, (int(height), int(width)), crop
        self.transform, self.seed, self.epoch = transform, seed, 0
        self.known = list(catalog.known if known is None else known)
        place = {identity: i for i, identity in enumerate(self.known)}
        self.labels = catalog.table["identity"].map(place).fillna(-1).to_numpy(dtype=np.int64)
        self._paths = catalog.table["path"].tolist()
        self._boxes = [None] * len(self._paths)
        if crop == "box":
            boxes = catalog.table[["x0", "y0", "x1", "y1"]].to_numpy(dtype=float)
            self._boxes = [None if np.isnan(box).any() else tuple(box) for box in boxes]
        self._pixels = None
        if folder is not None:
            self._pixels = self._on_disk(Path(folder))
        elif memory:
            self._pixels = self._decoded(np.empty((len(self), *self.size, 3), dtype=np.uint8))

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return item ``index`` as the class says."""
        index = range(len(self))[index]  # also from the end; beyond it an IndexError
        image = self.pixels(index)
        if self.transform is not None:
            image = augmented(self.transform, (self.seed, self.epoch, index), image=image)["image"]
        tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        tensor = tensor.float().div_(255) if image.dtype == np.uint8 else tensor.float()
        return {"image": tensor, "label": int(self.labels[index]), "index": index}

    def pixels(self, index: int) -> np.ndarray:
        """Return the photograph, cropped and resized only: (H, W, 3) uint8 RGB."""
        return self._read(index) if self._pixels is None else np.array(self._pixels[index])

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
        parts = [self.catalog.fingerprint, self.size, self.crop]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _read(self, index: int) -> np.ndarray:
        return read_image(self._paths[index], size=self.size, box=self._boxes[index])

    def _decoded(self, out: np.ndarray) -> np.ndarray:
        def fill(index: int) -> None:
            out[index] = self._read(index)

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
            for _ in tqdm(pool.map(fill, range(len(self))), "Reading photographs", len(self), leave=False):
                pass
        return out

    def _on_disk(self, folder: Path) -> np.ndarray:
        path = folder / f"photographs-{self._pixels_key}.npy"
        if not path.exists():
            with replacing(path) as part:
                shape = (len(self), *self.size, 3)
                self._decoded(np.lib.format.open_memmap(part, "w+", np.uint8, shape)).flush()
        return np.load(path, mmap_mode="r")
