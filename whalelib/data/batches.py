"""The second solution's batches: every photograph and its mirror image, in groups of one class (section 4.3.3)."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import pandas as pd
import torch
from torch.utils.data import Dataset

from whalelib.data.layouts import NEW_WHALE
from whalelib.data.photographs import Photographs, as_tensor, labels_of, transformed


class Doubled(Dataset):
    """Photographs twice over: as they are, then mirrored as whales of their own.

    Of N photographs and C whales, item i is a dict: ``image`` as the photographs'; ``label``, a whale's place in
    ``known``, that plus C when i is N or more and so the photograph i - N mirrored, 2C for ``new_whale``, -1
    for a photograph of none of these; ``index`` = i. A new whale mirrored is as new: it's mirrored or not by the
    toss of a coin in both halves. All draws depend on (seed, epoch, i) alone, the seed being the photographs'.

    Args:
        photographs: labelled, with the transform of training, which comes before the mirror.
        twice: False leaves the mirrored whales out, and with them half of the items.

    Attributes:
        labels: (2N,) the items'.
        new: 2C.
    """

    def __init__(self, photographs: Photographs, twice: bool = True):
        self.photographs, self.epoch = photographs, 0
        self.new = 2 * len(photographs.known)
        labels = doubled(photographs.catalog.table["identity"], photographs.known)
        self.labels = labels if twice else labels[: len(photographs)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return item ``index`` as the class says."""
        index = range(len(self))[index]
        pixels = self.photographs.pixels(index % len(self.photographs))
        key = (self.photographs.seed, self.epoch, index)
        if self.photographs.transform is not None:
            pixels = transformed(self.photographs.transform, key, pixels)
        if self.mirrored(index):
            pixels = pixels[:, ::-1]
        return {"image": as_tensor(pixels), "label": int(self.labels[index]), "index": index}

    def mirrored(self, index: int) -> bool:
        """Say whether item ``index`` is a mirror image in this epoch."""
        if self.labels[index] != self.new:
            return index >= len(self.photographs)
        return np.random.default_rng([self.photographs.seed, self.epoch, index, 1]).random() < 0.5

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, whose draws the items show."""
        self.epoch = epoch

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the items."""
        parts = ["doubled", self.photographs.fingerprint, len(self)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def doubled(identity: pd.Series, known: Sequence[str]) -> np.ndarray:
    """Return the labels (2N,) of N photographs and their mirror images, as :class:`Doubled` has them."""
    plain, whales = labels_of(identity, known), len(known)
    mirrored = np.where(plain >= 0, plain + whales, plain)
    new = identity.isin([NEW_WHALE]).to_numpy()
    return np.where(np.tile(new, 2), 2 * whales, np.concatenate([plain, mirrored]))


class PxK:
    """A sampler of batches of P groups, K images of a class each, a set share of the groups being new whales.

    A batch holds different whales, with one group each, then the groups of ``new_whale``. An epoch deals out each
    whale's images once, in groups of K, shuffled; what doesn't fill a group is left out. A whale with fewer than K
    gives one group, drawn with replacement. Images of ``new_whale`` are drawn anew for each batch, without repeats
    in it where there are enough, and never run out. An epoch ends when too few whales have a group left; how many
    batches that makes varies a little with the draws.

    For ``train.fit``. Its draws come from its own generator, of (seed, epoch).

    Args:
        labels: (N,) integers; images with a negative one have no part.
        batch: images in a batch, of which P = batch // K groups are made.
        new: the label of ``new_whale``. Where no image has it, all groups are whales'.
        images: K.
        share: int(P * share) groups are ``new_whale``'s.
        seed: of the draws.

    Raises:
        ValueError: an argument makes no sense, or there are fewer whales than a batch needs.

    Source: report, section 4.3.3; batch hard (Hermans et al., 2017). How an epoch is dealt out is the code's.
    """

    def __init__(
        self, labels: np.ndarray, batch: int, new: int, *, images: int = 4, share: float = 0.25, seed: int = 0
    ):
        if not 1 <= images <= batch or not 0 <= share < 1:
            raise ValueError(
                f"{images} images a class, batches of {batch}, a share of {share} of new whales: give one image or "
                "more, a batch for a group at least, a share of 0 or more and below 1"
            )
        order = np.argsort(labels, kind="stable")
        found, starts = np.unique(np.asarray(labels)[order], return_index=True)
        rows = dict(zip(found.tolist(), np.split(order, starts[1:]), strict=bool(len(found))))
        self.strangers = rows.pop(new, np.empty(0, dtype=np.int64))
        self.rows = {label: own for label, own in rows.items() if label >= 0}
        groups = batch // images
        self.new_groups = int(groups * share) if len(self.strangers) else 0
        self.whales = groups - self.new_groups
        if len(self.rows) < self.whales:
            raise ValueError(
                f"{len(self.rows)} whales, mirrored ones counted too: a batch of {batch} needs {self.whales}"
            )
        self.images, self.seed = images, seed
        self.set_epoch(0)

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the epoch's batches, P * K places in ``labels`` each."""
        yield from self._batches

    def __len__(self):
        """How many batches this epoch has."""
        return len(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, and deal it out."""
        self._batches = self._dealt(np.random.default_rng([self.seed, epoch]))

    def _dealt(self, rng: np.random.Generator) -> list[list[int]]:
        left = [self._groups(own, rng) for own in self.rows.values()]
        strangers = self.new_groups * self.images
        batches = []
        while len(left) >= self.whales:
            chosen = rng.choice(len(left), self.whales, replace=False)
            batch = [left[place].pop() for place in chosen]
            for place in sorted(chosen.tolist(), reverse=True):
                if not left[place]:
                    left[place] = left[-1]
                    left.pop()
            if strangers:
                batch.append(rng.choice(self.strangers, strangers, replace=len(self.strangers) < strangers))
            batches.append(np.concatenate(batch).tolist())
        return batches

    def _groups(self, own: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
        """Return one whale's images in groups of K."""
        if len(own) < self.images:
            return [rng.choice(own, self.images)]
        count = len(own) // self.images
        return list(rng.permutation(own)[: count * self.images].reshape(count, self.images))


class Shuffled:
    """A sampler of shuffled batches; what an epoch doesn't fill is left out, unless it is the only one.

    For ``train.fit``, as part of ``Portions``. Its draws come from its own generator, of (seed, epoch).

    Args:
        count: of the items.
        batch: items in a batch.
        seed: of the draws.
    """

    def __init__(self, count: int, batch: int, seed: int = 0):
        self.count, self.batch, self.seed, self.epoch = count, batch, seed, 0

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the epoch's batches."""
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.count).tolist()
        for start in range(0, max(self.count - self.batch, 0) + 1, self.batch):
            yield order[start : start + self.batch]

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up."""
        self.epoch = epoch


class Portions:
    """A sampler that gives so many batches an epoch, one portion after another of what another sampler deals out.

    Training then counts in epochs of its own, however long a pass over the data is. For ``train.fit``.

    Args:
        sampler: has ``set_epoch``; its epochs follow each other without a break.
        batches: in a portion.
    """

    def __init__(self, sampler: PxK | Shuffled, batches: int):
        self.sampler, self.batches, self.epoch = sampler, batches, 0
        self._lengths = []  # batches of the passes dealt out so far, so that none is dealt again to be skipped

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the portion's batches."""
        skip, left = self.epoch * self.batches, self.batches
        for number in count():
            if number < len(self._lengths) and skip >= self._lengths[number]:
                skip -= self._lengths[number]
                continue
            self.sampler.set_epoch(number)
            dealt = list(self.sampler)
            if number == len(self._lengths):
                self._lengths.append(len(dealt))
            chosen = dealt[skip : skip + left]
            yield from chosen
            skip, left = max(0, skip - len(dealt)), left - len(chosen)
            if not left:
                return

    def __len__(self):
        """How many batches a portion has."""
        return self.batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the portion, from 0 up."""
        self.epoch = epoch
