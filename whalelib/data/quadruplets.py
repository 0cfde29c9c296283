"""The first solution's batches: an anchor, a positive, a negative and a new whale at a time (section 3.3.3)."""

import hashlib
import json

import numpy as np
import torch
from torch.utils.data import Dataset

from whalelib.data.layouts import NEW_WHALE
from whalelib.data.photographs import Photographs, as_tensor, transformed

FLIPS = ("pair", "each")


class Quadruplets(Dataset):
    """Four photographs an item: two of a class, one of another whale, one of a new whale.

    Item i is a dict: ``image`` (4, C, H, W) as the photographs', ``label`` (4,): a whale's place in ``known``, that
    plus C when the photograph is mirrored, and 2C for ``new_whale``, mirrored or not. Items go through the classes
    (whales, and ``new_whale`` as one more) in an order drawn anew for each pass; an epoch is as long as it is told,
    wherever that cuts a pass. All draws depend on (seed, epoch, i) alone.

    A class with one photograph gives it twice, each time with its own augmentation. Where there is no photograph of a
    new whale, the fourth is of another known one.

    Args:
        photographs: labelled, with the transform of training.
        items: in an epoch.
        minimum: photographs that a class must have to take part.
        flip: probability that a photograph is mirrored.
        flips: "pair": anchor and positive together, so that a positive there always is; "each": each of the
            four for itself, as the first solution's code did.
        seed: of the draws.

    Raises:
        ValueError: fewer than two whales have that many photographs.
    """

    def __init__(
        self,
        photographs: Photographs,
        items: int,
        *,
        minimum: int = 1,
        flip: float = 0.5,
        flips: str = "pair",
        seed: int = 0,
    ):
        if flips not in FLIPS:
            raise ValueError(f"flips = {flips!r}: choose one of {', '.join(FLIPS)}")
        self.photographs, self.items, self.seed, self.epoch = photographs, int(items), seed, 0
        self.minimum, self.flip, self.flips = minimum, flip, flips
        self.new = 2 * len(photographs.known)
        identity = photographs.catalog.table["identity"].to_numpy(dtype=object)
        labels = np.where(identity == NEW_WHALE, self.new, photographs.labels)
        self.rows = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels) if label >= 0}
        self.strangers = self.rows.get(self.new, np.empty(0, dtype=np.int64))
        self.classes = np.array([label for label, rows in self.rows.items() if len(rows) >= minimum])
        self.whales = self.classes[self.classes != self.new]
        if len(self.whales) < 2:
            raise ValueError(
                f"{photographs.catalog.name}: {len(self.whales)} whales have {minimum} photographs or more; two "
                "at least are needed"
            )

    def __len__(self):
        return self.items

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return item ``index`` as the class says."""
        index = range(len(self))[index]
        rows, labels, mirrored = self.draw(index)
        images = []
        for place, (row, flip) in enumerate(zip(rows, mirrored, strict=True)):
            pixels = self.photographs.pixels(int(row))
            pixels = np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels
            if self.photographs.transform is not None:
                key = (self.seed, self.epoch, index, place)
                pixels = transformed(self.photographs.transform, key, pixels)
            images.append(as_tensor(pixels))
        return {"image": torch.stack(images), "label": torch.from_numpy(labels), "index": index}

    def draw(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return an item's rows of the catalog, its labels and whether each is mirrored, (4,) each."""
        turn, place = divmod(self.epoch * self.items + index, len(self.classes))
        label = np.random.default_rng([self.seed, turn]).permutation(self.classes)[place]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        own = self.rows[int(label)]
        pair = rng.choice(own, 2, replace=False) if len(own) > 1 else own[[0, 0]]
        other = rng.choice(self.whales[self.whales != label])
        fourth = self.new
        if not len(self.strangers):
            fourth = rng.choice(self.whales[(self.whales != label) & (self.whales != other)], 1).tolist()
            fourth = fourth[0] if fourth else other
        labels = np.array([label, label, other, fourth], dtype=np.int64)
        rows = np.array([*pair, rng.choice(self.rows[int(other)]), rng.choice(self.rows[int(fourth)])])
        mirrored = rng.random(4) < self.flip
        if self.flips == "pair":
            mirrored[1] = mirrored[0]
        labels[mirrored & (labels < self.new)] += self.new // 2
        return rows, labels, mirrored

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, whose draws the items show."""
        self.epoch = epoch

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the items."""
        parts = [self.photographs.fingerprint, self.items, self.minimum, self.flip, self.flips, self.seed]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
