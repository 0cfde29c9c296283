"""What matters: each recipe whole, and again with one part left out, or added.

Every training sees as many images. `python -m whalelib.recipes.ablation DATA --seed 0` enters the scores in the ledger,
under notebook 06_02.
"""

import argparse
import sys
import time
from functools import partial

from whalelib.contest import Contest
from whalelib.ledger import append_ledger, rows_of
from whalelib.recipes import first, second, third
from whalelib.recipes.baseline import Answer
from whalelib.run import DEVICES, Run, Settings, add_run_arguments

WHOLE = "the recipe"


def _case(*networks: object, **views: bool) -> tuple[tuple, dict[str, bool]]:
    return networks, views


# By recipe and name: the networks, as the recipe's Choices, and by which views they name.
CASES = {
    "first": {
        WHOLE: _case(first.Choices()),
        **{f"without {part}": _case(first.Choices(without=(part,))) for part in first.PARTS},
        "named without mirror images": _case(first.Choices(), mirrored=False),
    },
    "second": {
        WHOLE: _case(second.Choices()),
        **{f"without {part}": _case(second.Choices(without=(part,))) for part in second.PARTS},
        "with a margin of 0": _case(second.Choices(margin=0.0)),
        "with pseudo labels": _case(second.Choices(pseudo=True)),
        "named without mirror images": _case(second.Choices(), mirrored=False),
        "two networks, wide and square": _case(*(second.choices_of("lab", model) for model in "ac")),
    },
    "third": {
        WHOLE: _case(third.Choices()),
        **{f"without {part}": _case(third.Choices(without=(part,))) for part in third.PARTS},
        "with a margin of 0": _case(third.Choices(margin=0.0)),
        "without aligned crops": _case(third.Choices(aligned=0.0), aligned=False),
        "with averaged weights": _case(third.Choices(average=True)),
        "named without mirror images": _case(third.Choices(), mirrored=False),
        "three networks": _case(*(third.Choices(model=model) for model in third.MODELS)),
    },
}
WAY = {"first": "neighbours", "second": "neighbours", "third": "held"}  # of naming, as `compare` calls it
ANSWER = {
    "first": (first.trained, first.by_neighbours),
    "second": (second.trained, first.by_neighbours),
    "third": (third.trained, partial(third.answer, by=WAY["third"])),
}


def answer(run: Run, recipe: str, case: str) -> Answer:
    """Name the queries with one of the CASES, its networks trained or fetched from the cache.

    All are named by their neighbours, with a threshold chosen on held-out photographs, so that nothing but the case
    differs.
    """
    networks, views = CASES[recipe][case]
    train, name = ANSWER[recipe]
    return name([train(run, choices) for choices in networks], **views)


def score(run: Run, recipe: str, case: str) -> float:
    """Return MAP@5 on the test photographs of one of the CASES."""
    images = run.catalog.test.table["image"]
    return Contest.open(run.catalog).score_guesses(images, answer(run, recipe, case).guesses).all


def main(arguments: list[str] | None = None) -> int:
    """Measure the cases and enter their scores in the ledger."""
    parser = argparse.ArgumentParser(
        prog="python -m whalelib.recipes.ablation", description=__doc__.split("\n", maxsplit=1)[0]
    )
    add_run_arguments(parser)
    parser.add_argument("--recipes", nargs="+", choices=CASES, default=list(CASES))
    known = dict.fromkeys(case for named in CASES.values() for case in named)
    parser.add_argument(
        "--cases", nargs="+", choices=known, default=list(known), metavar="CASE", help="default all"
    )
    parser.add_argument("--device", choices=DEVICES, default=DEVICES[0])
    chosen = parser.parse_args(arguments)
    settings = Settings(chosen.data, edition=chosen.edition, seed=chosen.seed, device=chosen.device)
    run = Run("06_02", settings)
    for recipe in chosen.recipes:
        for case in [case for case in CASES[recipe] if case in chosen.cases]:
            began = time.monotonic()
            values = {f"{recipe}: {case}": round(score(run, recipe, case), 4)}
            print(values, flush=True)
            seconds = time.monotonic() - began
            rows = rows_of(run, values, command="python -m whalelib.recipes.ablation", seconds=seconds)
            append_ledger(rows, allow_dirty=chosen.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
