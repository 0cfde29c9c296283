"""Does what a network learns in the world help with real flukes? `python -m whalelib.realism FOLDER`.

Identity: two embeddings are scored on the same real photographs: frozen ImageNet features, and the same network
fine-tuned on generated whales only. Neither sees a real fluke in training; real training photographs serve as gallery
and for the threshold. The values go to the ledger.

Segmentation: `mask_overlap` measures any mask model on photographs that have masks drawn by hand. The
model of chapter 3, trained on the world, will be measured with it.
"""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch

from whalelib import augment
from whalelib.contest import Contest
from whalelib.data import Catalog, open_catalog, read_image
from whalelib.data.photographs import Photographs
from whalelib.identify import hold_out
from whalelib.ledger import append_ledger
from whalelib.metrics import mask_iou
from whalelib.models import Identifier
from whalelib.recipes import baseline
from whalelib.run import Settings
from whalelib.train import fit

SIZE = baseline.SIZES["lab"]


def worlds(count: int) -> Catalog:
    """Return the known whales of `count` lab worlds, of different seeds, as one catalog to train on."""
    parts = [baseline.named(open_catalog(f"world:lab@{2019 + k}").train) for k in range(count)]
    return replace(parts[0], table=pd.concat([part.table for part in parts], ignore_index=True))


def score(model: Identifier, catalog: Catalog, contest: Contest, seed: int) -> float:
    """Return MAP@5 on the catalog's test photographs, by cosine neighbours among its training photographs."""
    rest, held = hold_out(catalog.train, seed=seed)
    answer = baseline.answer(
        model, *(Photographs(part, SIZE, known=rest.known) for part in (rest, held, catalog.test))
    )
    ids = [" ".join(name for name in row if name) for row in answer.guesses]
    return contest.score(pd.DataFrame({"Image": catalog.test.table["image"], "Id": ids})).all


def mask_overlap(predict: Callable[[np.ndarray], np.ndarray], catalog: Catalog) -> pd.Series:
    """Return the IoU of each photograph's predicted mask with its own, indexed by image.

    Args:
        predict: from a photograph (H, W, 3) uint8 RGB to its mask (H, W), true on the fluke.
        catalog: with masks; photographs without one are left out.

    Raises:
        ValueError: no photograph has a mask.
    """
    table = catalog.table
    if "mask" not in table or table["mask"].isna().all():
        raise ValueError(f"{catalog.name}: no photograph has a mask")
    rows = table[table["mask"].notna()]
    scores = [
        mask_iou(predict(read_image(r.path)), read_image(r.mask, mode="L") > 127) for r in rows.itertuples()
    ]
    return pd.Series(scores, index=rows["image"], name="IoU")


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison and enter its two values in the ledger."""
    parser = argparse.ArgumentParser(prog="python -m whalelib.realism", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="real photographs with test labels")
    parser.add_argument("--worlds", type=int, default=4, help="lab worlds to train on (default 4)")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--allow-dirty", action="store_true", help="enter values of code that is not committed"
    )
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    settings = Settings(data=chosen.folder, seed=chosen.seed)
    catalog = open_catalog(settings.source).verified()
    contest = Contest.open(catalog)
    train = worlds(chosen.worlds)
    model = Identifier(len(train.known), seed=chosen.seed)
    values = {"MAP@5, frozen ImageNet features": score(model, catalog, contest, chosen.seed)}
    print(f"frozen ImageNet features: {next(iter(values.values())):.4f}", flush=True)
    fit(
        model,
        Photographs(train, SIZE, transform=augment.baseline(SIZE), seed=chosen.seed),
        baseline.loss,
        epochs=chosen.epochs,
        optimizer=baseline.optimizer,
        schedule=baseline.schedule(chosen.epochs),
        seed=chosen.seed,
    )
    title = (
        f"MAP@5, fine-tuned on {chosen.worlds} worlds of {len(train.known)} whales, {chosen.epochs} epochs"
    )
    values[title] = score(model, catalog, contest, chosen.seed)
    print(f"{title}: {values[title]:.4f}")
    seconds = round(time.monotonic() - started, 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    about = {"notebook": "realism", "command": "python -m whalelib.realism", "data": settings.public_data}
    about |= {"profile": "lab", "edition": "as_described", "seed": chosen.seed, "device": device}
    rows = [
        {**about, "metric": name, "value": round(value, 4), "seconds": seconds}
        for name, value in values.items()
    ]
    append_ledger(rows, allow_dirty=chosen.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
