"""From the baseline to the first place recipe, one part at a time: `python -m whalelib.recipes.ladder DATA`.

Every rung adds one thing to the rung before and sees as many images of the same size. The scores go to the ledger under
notebook 03_16, which shows them: they say which part of the recipe helps at a laptop's budget, and which does not.
"""

import argparse
import sys
import time
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset

from whalelib import augment
from whalelib.contest import Contest
from whalelib.data.photographs import Photographs, as_tensor, transformed
from whalelib.ledger import append_ledger
from whalelib.losses import cross_entropy, euclidean, triplet
from whalelib.models import FirstPlace
from whalelib.recipes import baseline, first
from whalelib.run import EDITIONS, Run, Settings
from whalelib.train import fit

SIZE = (64, 128)
RUNGS = (
    "the baseline",
    "and boxes",
    "and Table 3.1",
    "and mirrored flukes as whales",
    "and masks, both heads, triplet losses",
    "the recipe: quadruplets, binary cross-entropy, three steps",
)


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


def climb(run: Run, rungs: range = range(len(RUNGS))) -> dict[str, float]:
    """Return MAP@5 on the test photographs of each rung, all named by neighbours."""
    contest = Contest.open(run.catalog)
    here = replace(first.parts(run), size=SIZE)
    scores = {}
    for rung in rungs:
        if rung == len(RUNGS) - 1:
            guesses = first.answer(first.trained(run, first.Choices(size=SIZE)), "neighbours").guesses
        else:
            guesses = _guesses(rung, run, here)
        scores[RUNGS[rung]] = contest.score_guesses(here.queries.table["image"], guesses).all
        print(f"{RUNGS[rung]}: {scores[RUNGS[rung]]:.4f}", flush=True)
    return scores


def _guesses(rung: int, run: Run, here: first.Parts) -> np.ndarray:
    """Train a rung below the recipe, and name the queries' whales."""
    seed, edition, profile = run.settings.seed, run.settings.edition, run.settings.profile
    options = {"masks": rung >= 4, "crop": "box" if rung >= 1 else None}
    transform = augment.first_place(SIZE, edition) if rung >= 2 else augment.baseline(SIZE)
    named = here.photographs(baseline.named(here.rest), transform, **options)
    whales = len(here.known)
    if rung < 4:
        model = baseline.network(whales * (2 if rung >= 3 else 1), seed)
        optimizer, loss = baseline.optimizer, baseline.loss
    else:
        model, optimizer, loss = FirstPlace(whales, edition=edition, seed=seed), _optimizer, _loss
    epochs = baseline.epochs(profile, len(named))
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


def _optimizer(model: FirstPlace) -> torch.optim.Optimizer:
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
    parser.add_argument("data", help="world, or a folder with test labels")
    parser.add_argument("--edition", choices=EDITIONS, default=EDITIONS[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rungs", type=int, nargs="+", default=range(len(RUNGS)), help="0 to 5")
    parser.add_argument(
        "--allow-dirty", action="store_true", help="enter values of code that is not committed"
    )
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    run = Run("03_16", Settings(data=chosen.data, edition=chosen.edition, seed=chosen.seed))
    scores = climb(run, chosen.rungs)
    about = {"notebook": "03_16", "command": "python -m whalelib.recipes.ladder", "profile": "lab"}
    about |= {"data": run.settings.public_data, "edition": chosen.edition, "seed": chosen.seed}
    about |= {"device": run.device_name, "seconds": round(time.monotonic() - started, 1)}
    rows = [
        {**about, "metric": f"ladder at {SIZE[0]} x {SIZE[1]}: {rung}", "value": round(score, 4)}
        for rung, score in scores.items()
    ]
    append_ledger(rows, allow_dirty=chosen.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
