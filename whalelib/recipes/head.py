"""The first solution's linear layer alone, trained on features that stay as they are: a test in minutes.

The report's re-run of the solution stayed ten points below the winners. Two things differed from the winners or from
today's practice: batches of 5 in place of 12, and Adam, whose weight decay is added to the gradient and so divided by
its usual size. A whale that is seldom seen has small gradients; its row of the linear layer shrinks as fast as others
grow. Without the backbone thousands of steps at the solution's own learning rate take half a minute:
`python -m whalelib.recipes.head DATA --seed 0` enters all four ways in the ledger, under notebook 03_16.
"""

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from whalelib.contest import Contest
from whalelib.data import NEW_WHALE
from whalelib.data.photographs import Photographs
from whalelib.data.quadruplets import Quadruplets
from whalelib.identify import choose_threshold, top5
from whalelib.ledger import append_ledger, rows_of
from whalelib.losses import top_errors
from whalelib.models import FirstPlace
from whalelib.recipes import first
from whalelib.run import Run, Settings
from whalelib.train import fit

WAYS = tuple((optimizer, batch) for optimizer in ("Adam", "AdamW") for batch in (5, 12))
STEPS, EPOCHS = 2_000, 10


class Head(FirstPlace):
    """The first solution's global head, on pooled features (..., F) in place of images."""

    def __init__(self, identities: int, features: int, *, seed: int = 0):
        backbone = nn.Identity()
        backbone.num_features = features
        super().__init__(identities, backbone, local=1, seed=seed)

    def forward(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``logits`` (N, 2C) of rows (..., F)."""
        found = self.globally(rows.flatten(0, -2)[:, :, None, None])
        return {"logits": self.SCALE * self.head(found)}


class Rows(Dataset):
    """What :class:`Quadruplets` draws, as features (4, F) instead of images."""

    def __init__(self, quadruplets: Quadruplets, features: torch.Tensor):
        self.quadruplets, self.features = quadruplets, features
        self.fingerprint = f"features of {quadruplets.fingerprint}"

    def __len__(self):
        return len(self.quadruplets)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, whose draws the items show."""
        self.quadruplets.set_epoch(epoch)

    def __getitem__(self, index: int) -> dict:
        """Return item ``index``: ``image`` (4, F), ``label`` (4,)."""
        rows, labels, mirrored = self.quadruplets.draw(index)
        return {"image": self.features[rows, mirrored.astype(int)], "label": labels}


@torch.inference_mode()
def pooled(model: FirstPlace, photographs: Photographs) -> torch.Tensor:
    """Return pooled features (N, 2, F) of N photographs, each as it is and mirrored; no augmentation."""
    model.eval()
    device, parts = next(model.parameters()).device, []
    for batch in DataLoader(photographs.plain(), batch_size=64):
        images = batch["image"].to(device)
        both = [model.features(view).mean((2, 3)) for view in (images, images.flip(-1))]
        parts.append(torch.stack(both, 1).float().cpu())
    return torch.cat(parts)


def ways(
    trained: first.Trained, judge: Callable[[np.ndarray], float], steps: int = STEPS, seed: int | None = None
) -> pd.DataFrame:
    """Train the head in each of the WAYS on the features of a trained network, from the same new weights.

    Args:
        trained: whose photographs and features to take; its own head is not used.
        judge: of the queries' guesses (Q, 5): MAP@5.
        steps: of the optimizer, at the solution's learning rate of 3e-4.
        seed: of the new weights, the draws and dropout; default that of ``trained``.

    Returns:
        A row a way: ``cross-entropy`` over the last tenth of the steps; ``MAP@5`` and ``new_whale first`` (the share
        of the queries for which it is the first guess); ``rows, rare`` and ``rows, common``, the mean length of the
        linear layer's rows of whales with one photograph and with five or more.
    """
    here, known = trained.parts, trained.parts.known
    seed = here.seed if seed is None else seed
    parts = {"rest": here.rest, "held": here.held, "queries": here.queries}
    features = {name: pooled(trained.model, here.photographs(part)) for name, part in parts.items()}
    truth = here.held.table["identity"].to_numpy(dtype=object)
    sizes = here.rest.table["identity"].value_counts().reindex(known).fillna(0).to_numpy()
    read = here.photographs(here.rest, memory=False)
    table = {}
    for kind, batch in WAYS:
        head = Head(len(known), features["rest"].shape[2], seed=seed)
        data = Rows(Quadruplets(read, steps // EPOCHS * batch, seed=seed), features["rest"])
        optimizer = partial(first.optimizer, kind=kind)
        history = fit(
            head, data, _loss, epochs=EPOCHS, batch_size=batch, optimizer=optimizer, clip=5.0, seed=seed
        )
        found = {name: _probabilities(head, features[name]) for name in ("held", "queries")}
        guesses = top5(found["queries"], known, choose_threshold(found["held"], known, truth))
        length = head.head.weight.detach().norm(dim=1)[: len(known)].cpu().numpy()
        table[f"{kind}, batch {batch}"] = {
            "cross-entropy": history["loss"].iloc[-1],
            "MAP@5": judge(guesses),
            "new_whale first": (guesses[:, 0] == NEW_WHALE).mean(),
            "rows, rare": pd.Series(length[sizes == 1]).mean(),
            "rows, common": pd.Series(length[sizes >= 5]).mean(),
        }
    return pd.DataFrame(table).T


def _loss(output: dict, batch: dict) -> torch.Tensor:
    return top_errors(output["logits"], batch["label"].flatten())


@torch.inference_mode()
def _probabilities(head: Head, features: torch.Tensor) -> np.ndarray:
    """Return what `first.probabilities` does, of features (Q, 2, F)."""
    head.eval()
    logits = head(features.to(head.head.weight.device))["logits"]
    views = logits.sigmoid().view(len(features), 2, -1).unbind(1)
    return first.whales_of(*views).mean(0).cpu().numpy()


def main(arguments: list[str] | None = None) -> int:
    """Try all ways and enter what comes out in the ledger."""
    parser = argparse.ArgumentParser(
        prog="python -m whalelib.recipes.head", description=__doc__.split("\n", maxsplit=1)[0]
    )
    parser.add_argument("data", help="world, or a folder with test labels")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the head; the features are of a network of seed 0"
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    run = Run("03_16", Settings(data=chosen.data))
    contest, trained = Contest.open(run.catalog), first.trained(run)
    images = trained.parts.queries.table["image"]
    table = ways(
        trained, lambda guesses: contest.score_guesses(images, guesses).all, chosen.steps, chosen.seed
    )
    print(table.round(3).to_string())
    values = {
        f"the head alone, {chosen.steps} steps, {way}: {name}": round(value, 4)
        for way, row in table.iterrows()
        for name, value in row.items()
    }
    command = f"python -m whalelib.recipes.head --steps {chosen.steps}"
    rows = rows_of(run, values, command=command, seconds=time.monotonic() - started, seed=chosen.seed)
    append_ledger(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
