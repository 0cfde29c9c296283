"""From the baseline to a recipe, one part at a time: `python -m whalelib.recipes.ladder first|second|third DATA`.

Every rung adds one thing to the rung before and sees as many images of as many pixels. The scores go to the ledger of
notebook 03_16, 04_17 or 05_15, which say by them which part of a recipe helps at a laptop's budget, and which does not.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from whalelib import augment, landmarks
from whalelib.contest import Contest
from whalelib.data import Catalog, statistics
from whalelib.data.layouts import BOX
from whalelib.data.photographs import Photographs, as_tensor, transformed
from whalelib.identify import embed, hold_out
from whalelib.ledger import append_ledger, rows_of
from whalelib.losses import cross_entropy, euclidean, triplet
from whalelib.models import FirstPlace, SecondPlace, ThirdPlace
from whalelib.recipes import baseline, first, second, third
from whalelib.run import Run, Settings, add_run_arguments
from whalelib.train import fit

SIZE = (64, 128)
SQUARE = (88, 88)  # of the third solution: about as many pixels
RUNGS = {
    "first": (
        "the baseline",
        "and boxes",
        "and Table 3.1",
        "and mirrored flukes as whales",
        "and masks, both heads, triplet losses",
        "the recipe: quadruplets, binary cross-entropy, three steps",
    ),
    "second": (
        "the baseline",
        "and boxes",
        "and Table 4.1",
        "and mirrored flukes as whales",
        "and two heads, three losses",
        "the recipe: batches of pairs, a quarter of them new whales",
        "batches of fours",
    ),
    "third": (
        "the baseline",
        "and square crops about the fluke",
        "and Table 5.1, jittered crops",
        "and mirrored flukes as whales",
        "and half of the crops aligned",
        "and the embedding network with ArcFace",
        "the recipe: Adam, halved rates, templates",
    ),
}
NOTEBOOKS = {"first": "03_16", "second": "04_17", "third": "05_15"}


class Mirrored(Dataset):
    """Photographs of which half are mirrored, a mirrored whale being another: its label is C more."""

    def __init__(self, photographs: Photographs):
        self.photographs, self.epoch = photographs, 0
        self.fingerprint = f"mirrored {photographs.fingerprint}"

    def __len__(self):
        return len(self.photographs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, whose draws the items show."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        """Return item ``index``: ``image``, ``label``, ``index``, as the photographs have them."""
        given = self.photographs
        mirrored = np.random.default_rng([given.seed, self.epoch, index, 1]).random() < 0.5
        pixels = np.ascontiguousarray(given.pixels(index)[:, :: -1 if mirrored else 1])
        pixels = transformed(given.transform, (given.seed, self.epoch, index), pixels)
        label = int(given.labels[index]) + mirrored * len(given.known)
        return {"image": as_tensor(pixels), "label": label, "index": index}


def climb(run: Run, recipe: str, rungs: Sequence[int] | None = None) -> dict[str, float]:
    """Return MAP@5 on the test photographs of each rung, or of those asked for, all named by neighbours.

    recipe: "first", "second" or "third".
    """
    contest = Contest.open(run.catalog)
    here = {"first": first, "second": second, "third": third}[recipe].parts(run)
    here = replace(here, size=SQUARE if recipe == "third" else SIZE)
    scores = {}
    for rung in range(len(RUNGS[recipe])) if rungs is None else rungs:
        name = RUNGS[recipe][rung]
        if recipe == "third":
            guesses = _third(rung, run, here)
        else:
            guesses = _recipe(recipe, rung, run) if rung >= 5 else _guesses(recipe, rung, run, here)
        scores[name] = contest.score_guesses(here.queries.table["image"], guesses).all
        print(f"{name}: {scores[name]:.4f}", flush=True)
    return scores


def _recipe(recipe: str, rung: int, run: Run) -> np.ndarray:
    if recipe == "first":
        return first.answer(first.trained(run, first.Choices(size=SIZE)), "neighbours").guesses
    group = {5: None, 6: second.GROUP["paper"]}[rung]
    return second.answer(second.trained(run, second.Choices(size=SIZE, group=group)), "neighbours").guesses


def _guesses(recipe: str, rung: int, run: Run, here: first.Parts) -> np.ndarray:
    """Train a rung below the recipe, and name the queries' whales."""
    seed, edition, profile = run.settings.seed, run.settings.edition, run.settings.profile
    options = {"masks": recipe == "first" and rung >= 4, "crop": "box" if rung >= 1 else None}
    drawn = {"first": augment.first_place, "second": augment.second_place}[recipe]
    transform = drawn(SIZE, edition) if rung >= 2 else augment.baseline(SIZE)
    named = here.photographs(baseline.named(here.rest), transform, **options)
    whales, epochs = len(here.known), baseline.epochs(profile, len(named))
    if rung < 4:
        model = baseline.network(whales * (2 if rung >= 3 else 1), seed)
        optimizer, loss = baseline.optimizer, baseline.loss
    elif recipe == "first":
        model, optimizer, loss = FirstPlace(whales, edition=edition, seed=seed), _optimizer, _loss
    else:
        model, optimizer = SecondPlace(whales, edition=edition, seed=seed), _optimizer
        loss = second.Loss(edition, epochs, second.MARGIN[edition])
    fit(
        model,
        Mirrored(named) if rung >= 3 else named,
        loss,
        epochs=epochs,
        optimizer=optimizer,
        schedule=baseline.schedule(epochs),
        seed=seed,
        device=run.device,
    )
    photographs = [here.photographs(part, **options) for part in (here.rest, here.held, here.queries)]
    views = (model, first.Mirrored(model)) if rung >= 3 else (model,)
    return baseline.answer(views, *photographs).guesses


class OneEach:
    """A sampler of each photograph of `third.Flukes` once an epoch: as it is, or by the toss of a coin mirrored."""

    def __init__(self, photographs: int, mirrored: bool, seed: int):
        self.photographs, self.mirrored, self.seed, self.epoch = photographs, mirrored, seed, 0

    def __iter__(self) -> Iterator[int]:
        """Yield the epoch's items."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(self.photographs)
        other = rng.integers(0, 2, len(order)) * self.mirrored
        yield from (order + self.photographs * other).tolist()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up."""
        self.epoch = epoch


def _third(rung: int, run: Run, here: third.Parts) -> np.ndarray:
    """Train a rung of the third solution's ladder, and name the queries' whales."""
    if rung == 6:
        return third.answer(third.trained(run, third.Choices(size=SQUARE))).guesses
    seed, whales = run.settings.seed, len(here.known)
    catalog = run.catalog if rung == 0 else landmarks.located(run)
    rest, held = hold_out(catalog.train, seed=seed)
    named, mirrored, aligned = baseline.named(rest), rung >= 3, 0.5 if rung >= 4 else 0
    if rung < 2:
        size, crop = (SIZE, None) if rung == 0 else (SQUARE, "box")
        parts = [_with_crops(part) if rung else part for part in (named, rest, held, catalog.test)]
        options = {"crop": crop, "known": here.known, "seed": seed}
        drawn = [augment.baseline(size), None, None, None]
        data, *shown = (
            Photographs(part, size, transform=one, **options) for part, one in zip(parts, drawn, strict=True)
        )
    else:
        transform = augment.third_place(here.frame, run.settings.edition)
        data = here.flukes(named, transform=transform, aligned=aligned)
        shown = [here.flukes(part) for part in (rest, held, catalog.test)]
    epochs = baseline.epochs(run.settings.profile, len(named))
    model, optimizer, loss = (
        baseline.network(whales * (1 + mirrored), seed),
        baseline.optimizer,
        baseline.loss,
    )
    if rung == 5:
        model, optimizer, loss = third.network("lab", whales, seed, SQUARE), _optimizer, third.loss
    fit(
        model,
        data,
        loss,
        epochs=epochs,
        optimizer=optimizer,
        schedule=baseline.schedule(epochs),
        sampler=OneEach(len(named), mirrored, seed),
        seed=seed,
        device=run.device,
    )
    models = (model, first.Mirrored(model)) if mirrored else (model,)
    views = [[embed(one, part) for part in shown] for one in models]
    if aligned:
        views += [[embed(one, part.plain(1)) for part in shown] for one in models]
    names = [part.table["identity"].to_numpy(dtype=object) for part in (rest, held)]
    return baseline.answer_of(views, *names).guesses


def _with_crops(catalog: Catalog) -> Catalog:
    """Return photographs with the third solution's crops for boxes."""
    shape = statistics(catalog)[["height", "width"]].to_numpy(dtype=float)
    crops = landmarks.crop_pixels(landmarks.crop_of(*landmarks.shares(catalog.table, shape)), shape)
    table = catalog.table.copy()
    table[list(BOX)] = crops
    return replace(catalog, table=table)


def _optimizer(model: FirstPlace | SecondPlace | ThirdPlace) -> torch.optim.Optimizer:
    new = [p for name, p in model.named_parameters() if not name.startswith("backbone.") and p.requires_grad]
    groups = [{"params": list(model.backbone.parameters())}, {"params": new, "lr": 1e-2}]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-2)


def _loss(output: dict, batch: dict) -> torch.Tensor:
    labels, new = batch["label"], output["logits"].shape[1]
    apart = (euclidean(output["global"]), euclidean(output["local"].flatten(1)))
    return cross_entropy(output["logits"], labels) + sum(triplet(distance, labels, new) for distance in apart)


def main(arguments: list[str] | None = None) -> int:
    """Climb the ladder and enter its scores in the ledger."""
    parser = argparse.ArgumentParser(
        prog="python -m whalelib.recipes.ladder", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("recipe", choices=RUNGS)
    add_run_arguments(parser)
    parser.add_argument("--rungs", type=int, nargs="+", help="from 0; default all")
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    run = Run(NOTEBOOKS[chosen.recipe], Settings(data=chosen.data, edition=chosen.edition, seed=chosen.seed))
    scores = climb(run, chosen.recipe, chosen.rungs)
    values = {f"ladder at {SIZE[0]} x {SIZE[1]}: {rung}": round(score, 4) for rung, score in scores.items()}
    command = f"python -m whalelib.recipes.ladder {chosen.recipe}"
    rows = rows_of(run, values, command=command, seconds=time.monotonic() - started)
    append_ledger(rows, allow_dirty=chosen.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
