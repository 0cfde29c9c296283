"""The baseline and the three solutions on the same photographs, with the same budget of images.

All four start from the same ImageNet weights (EfficientNet-Lite0 under `lab`), see as many images, of about as many
pixels, and name the same queries: `python -m whalelib.recipes.compare DATA --seed 0` enters what comes out in the
ledger, under notebook 06_01.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from whalelib.contest import Contest
from whalelib.data import NEW_WHALE
from whalelib.identify import embedded_anew, hold_out, top5
from whalelib.ledger import append_ledger, rows_of
from whalelib.metrics import average_precision_at_k, bootstrap_interval
from whalelib.recipes import baseline, first, second, third
from whalelib.recipes.baseline import Answer
from whalelib.run import DEVICES, Run, Settings, add_run_arguments

WAYS = {"baseline": ("neighbours",), "first": first.BY, "second": second.BY, "third": third.BY}
# Training photographs of a whale, fewest and most.
SIZES = {"1": (1, 1), "2": (2, 2), "3 to 5": (3, 5), "6 and more": (6, np.inf)}


@dataclass(frozen=True)
class Contender:
    """One solution's answers and their price.

    answers: by way of naming; queries: names of the photographs, in the answers' order; images: seen in training;
    training: seconds on the machine that trained; naming: seconds here, in the first way; pixels: of an input.
    """

    answers: dict[str, Answer]
    queries: pd.Series
    images: int
    training: float
    naming: float
    pixels: int


def contender(run: Run, name: str, images: float = 1.0) -> Contender:
    """Train a solution on a run's data, or fetch it from the cache, and let it name the queries in each of its WAYS.

    Args:
        run: whose data, profile, edition, seed and device to take.
        name: one of WAYS.
        images: times the budget, for all alike.

    Raises:
        ValueError: no such solution.
    """
    if name not in WAYS:
        raise ValueError(f"name = {name!r}: choose one of {', '.join(WAYS)}")
    if name == "baseline":
        trained = baseline.trained(run, images)
        queries, size = trained.photographs[2].catalog, baseline.SIZES[run.settings.profile]
        answer = lambda _: baseline.answer(trained.model, *trained.photographs)  # noqa: E731
    else:
        recipe = {"first": first, "second": second, "third": third}[name]
        trained = recipe.trained(run, recipe.Choices(images=images * _share(run, recipe)))
        queries, size = trained.parts.queries, trained.parts.size
        answer = partial(recipe.answer, trained)
    own, *others = WAYS[name]
    began = time.monotonic()
    with embedded_anew():  # for the seconds
        answers = {own: answer(own)}
    naming, history = time.monotonic() - began, trained.history
    answers |= {way: answer(way) for way in others}
    seen, seconds = int(history["images"].sum()), float(history["seconds"].sum())
    return Contender(answers, queries.table["image"], seen, seconds, naming, size[0] * size[1])


def _share(run: Run, recipe: ModuleType) -> float:
    """Return how large the baseline's budget is beside a recipe's own: 1 in the lab, where they are one."""
    profile = run.settings.profile
    if profile != "paper":
        return 1.0
    rest, _ = hold_out(run.catalog.train, seed=run.settings.seed)
    return baseline.budget(profile, rest) / recipe.budget(profile, recipe.parts(run))


def judged(answer: Answer, truth: np.ndarray, photographs: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Return what an answer is worth, as a whole and in parts.

    Args:
        answer: of Q queries.
        truth: (Q,) right answers, `new_whale` among them.
        photographs: (Q,) of the right whale in training; 0 of new whales.
        seed: of the bootstrap.

    Returns:
        MAP@5 and its 95 % interval (low, high); the same of `known` and of `new` whales apart; `new_whale first`, a
        share; `ranking`: MAP@5 of the known whales if nobody may be rejected, and that by SIZES; `rejection`: how often
        a known whale's best similarity is above a new one's (the area under the curve of receiver operation; .5 is
        chance). NaN where there is nobody to judge.
    """
    new = truth == NEW_WHALE
    worth = average_precision_at_k(answer.guesses, truth)
    everyone = top5(answer.similarity, answer.identities, -np.inf)
    ranked = average_precision_at_k(everyone, truth)
    found = {"MAP@5": worth.mean()}
    found["low"], found["high"] = bootstrap_interval(worth, seed)
    found |= {"known": _mean(worth[~new]), "new": _mean(worth[new])}
    found["new_whale first"] = (answer.guesses[:, 0] == NEW_WHALE).mean()
    found |= {"ranking": _mean(ranked[~new]), "rejection": np.nan}
    if new.any() and not new.all():
        found["rejection"] = roc_auc_score(~new, answer.similarity.max(axis=1))
    for name, (least, most) in SIZES.items():
        found[f"ranking, {name}"] = _mean(ranked[(photographs >= least) & (photographs <= most)])
    return {name: float(value) for name, value in found.items()}


def _mean(values: np.ndarray) -> float:
    return values.mean() if len(values) else np.nan


def table(run: Run, contenders: dict[str, Contender]) -> pd.DataFrame:
    """Return what each answer is worth, a row a solution and way, see :func:`judged`; and what it cost.

    Raises:
        ContestError: the test photographs' labels are not at hand.
    """
    truth = Contest.open(run.catalog).reveal()
    sizes = run.catalog.train.table["identity"].value_counts().drop(NEW_WHALE, errors="ignore")
    rows = {}
    for name, one in contenders.items():
        right = truth.loc[one.queries].to_numpy(dtype=object)
        photographs = pd.Series(right).map(sizes).fillna(0).to_numpy()
        for way, answer in one.answers.items():
            cost = {"images": one.images, "training": one.training, "naming": one.naming}
            rows[name, way] = judged(answer, right, photographs) | cost
    frame = pd.DataFrame(rows).T
    frame.index.names = ["solution", "by"]
    return frame


KEPT = ("MAP@5", "ranking", "rejection")


def measure(run: Run, names: list[str], images: float = 1.0) -> dict[str, float]:
    """Return the ledger's values: KEPT of each answer, and the seconds of each training."""
    contenders = {name: contender(run, name, images) for name in names}
    budget = "" if images == 1 else f"{images:g} x the images, "
    values = {}
    for (name, way), row in table(run, contenders).iterrows():
        values |= {f"{budget}{name}, by {way}: {what}": round(float(row[what]), 4) for what in KEPT}
        values[f"{budget}{name}: training, seconds"] = round(float(row["training"]), 1)
    return values


def main(arguments: list[str] | None = None) -> int:
    """Train, name, and enter the scores in the ledger."""
    parser = argparse.ArgumentParser(
        prog="python -m whalelib.recipes.compare", description=__doc__.split("\n", maxsplit=1)[0]
    )
    add_run_arguments(parser)
    parser.add_argument("--recipes", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--images", type=float, default=1.0, help="times the budget")
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0])
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    settings = Settings(chosen.data, edition=chosen.edition, seed=chosen.seed, device=chosen.device)
    run = Run("06_01", settings)
    values = measure(run, chosen.recipes, chosen.images)
    print(pd.Series(values).to_string(), flush=True)
    rows = rows_of(
        run, values, command="python -m whalelib.recipes.compare", seconds=time.monotonic() - started
    )
    append_ledger(rows, allow_dirty=chosen.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
