"""The report's trainings in one table, and a command that runs them: `python -m whalelib.paper {list,run}`.

The fifteen networks of Tables 3.2, 4.2 and 5.2 and the detectors before them, through the recipes' own functions and at
their `paper` sizes. ``run --steps 2`` makes two real steps of each and keeps nothing: it says what a step takes, and
how much memory, before days are spent.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from whalelib import bench, keypoints, landmarks, locate, report
from whalelib.data import NEW_WHALE, Catalog, open_catalog, statistics
from whalelib.data.catalog import CatalogError
from whalelib.data.layouts import BOX
from whalelib.data.statistics import cache_key
from whalelib.files import replacing
from whalelib.identify import hold_out, pair_split
from whalelib.ledger import project_root
from whalelib.recipes import baseline, first, second, third
from whalelib.run import EDITIONS, PROFILES, Run, Settings, environment, place
from whalelib.train import TrialEnded, trial

RECIPES = {"first": first, "second": second, "third": third}
TABLES = {"first": "3.2", "second": "4.2", "third": "5.2"}
BATCH_CHOICES = {"first": "quadruplets", "second": "batch", "third": "batch"}
DETECTORS = ("masks", "keypoints", "landmarks")
BOXES = ("found", "true")


class PaperError(ValueError):
    """The runs can't be made as asked."""


@dataclass(frozen=True)
class Row:
    """One training of the report.

    name: as in its tables, "4.2/a"; recipe: one of RECIPES or DETECTORS; network: its backbone; size: (H, W) of the
    input; batch: images; images: that it sees of the contest's data, in about so many epochs (None where they differ in
    length); choices: of the recipe; part: of a detector, its backbone or fold; extra: with labelled photographs of an
    earlier contest; hours, batch_then, images_then: what the report says of its own training, None where nothing.
    """

    name: str
    recipe: str
    network: str
    size: tuple[int, int]
    batch: int
    images: int
    epochs: int | None = None
    choices: object = None
    part: str | int | None = None
    extra: bool = False
    hours: float | None = None
    batch_then: int | None = None
    images_then: int | None = None

    @property
    def fold(self) -> int | None:
        """Of a landmark detector, which fifth of its photographs is left out."""
        return self.part if self.recipe == "landmarks" else None

    @property
    def needs(self) -> tuple[str, ...]:
        """Names of the rows without which this one trains more than itself: detectors apart, one for pseudo labels."""
        pseudo = self.recipe == "second" and self.choices.pseudo
        return ("4.2/a",) if pseudo else ()


def hours_of(text: str) -> float:
    """Return the hours of a time as the report prints it: 31h00, 9h or 11min."""
    found = re.fullmatch(r"(?:(?P<hours>\d+)h)?(?:(?P<minutes>\d+)(?:min)?)?", text)
    if not (text and found):
        raise PaperError(f"{text!r} is no time such as 31h00, 9h or 11min")
    return int(found["hours"] or 0) + int(found["minutes"] or 0) / 60


@cache
def contest() -> Catalog:
    """Return a catalog of as many photographs of as many whales as the contest's training set, of which none exists."""
    sizes = report.class_sizes()
    each = np.repeat(sizes["photographs"], sizes["whales"])
    strangers = int(report.facts().loc["photographs of new_whale", "train"])
    whales = np.repeat([f"w_{number:04}" for number in range(len(each))], each)
    identity = np.concatenate([whales, np.repeat(NEW_WHALE, strangers)])
    names = [f"{number:05}.jpg" for number in range(len(identity))]
    paths = [str(Path("/", name)) for name in names]
    columns = {"image": names, "identity": identity, "path": paths, "split": "train"}
    return Catalog("the contest", Path(), pd.DataFrame(columns), pd.DataFrame())


@cache
def budget(profile: str, recipe: str) -> int:
    """Return how many images a recipe's network sees of the contest's photographs."""
    if recipe == "third":
        rest, held = pair_split(contest())
        gallery = baseline.named(contest())
        parts = third.Parts(rest, held, gallery, held, held, (0, 0), (0, 0), EDITIONS[0], 0)
    else:
        rest, held = hold_out(contest(), new=0.25)
        parts = first.Parts(rest, held, held, (0, 0), 0)
    return RECIPES[recipe].budget(profile, parts)


def rows(profile: str = "paper") -> tuple[Row, ...]:
    """Return the table of a profile: the detectors, then the fifteen networks; in the lab the same in small."""
    return (*_detectors(profile), *_first(profile), *_second(profile), *_third(profile))


def _detectors(profile: str) -> list[Row]:
    points, marks = keypoints.PLANS[profile], landmarks.PLANS[profile]
    found = [Row("masks", "masks", "lite0", locate.SIZE, 16, locate.IMAGES)]
    found += [
        Row(f"keypoints/{name}", "keypoints", name, points.size, points.batch, points.images, part=name)
        for name in points.backbones
    ]
    side = (marks.side, marks.side)
    return found + [
        Row(f"landmarks/{fold}", "landmarks", marks.backbone, side, marks.batch, marks.images, part=fold)
        for fold in range(marks.folds)
    ]


def _first(profile: str) -> list[Row]:
    network = "senet154" if profile == "paper" else "lite0"
    table, then = report.table("3.2"), report.first_place_checkpoints()
    found = []
    for number, model in enumerate(table["Model"].unique(), start=1):
        times = table.loc[table["Model"] == model, "Training time"]
        batch_then = 4 * 5  # quadruplets, section 3.4.1
        found.append(
            Row(
                f"3.2/{number}",
                "first",
                network,
                first.SIZES[profile],
                4 * first.BATCH[profile],
                budget(profile, "first"),
                choices=first.Choices(),
                extra=number == 2,
                hours=sum(map(hours_of, times)),
                batch_then=batch_then,
                images_then=batch_then * int(then.loc[then["Model"] == model, "iteration"].max()),
            )
        )
    return found


def _second(profile: str) -> list[Row]:
    table = report.table("4.3").set_index("Model")
    then = report.second_place_checkpoints().set_index("Model")
    found = []
    for model in second.MODELS:
        choices, batch_then = second.choices_of(profile, model), int(table.loc[model, "Batch size"])
        found.append(
            Row(
                f"4.2/{model}",
                "second",
                choices.backbone,
                choices.size,
                second.BATCH[profile],
                budget(profile, "second"),
                second.EPOCHS[profile],
                choices,
                hours=hours_of(table.loc[model, "Training time"]),
                batch_then=batch_then,
                images_then=batch_then * int(then.loc[model, "until"]),  # where it was best
            )
        )
    return found


def _third(profile: str) -> list[Row]:
    network = "densenet121" if profile == "paper" else "lite0"
    then = 500 * 2 * int(report.chapter5_facts()["training photographs"])  # section 5.6; and mirrored
    common = (network, third.SIZES[profile], third.BATCH, budget(profile, "third"), third.EPOCHS[profile])
    return [
        Row(f"5.2/{model}", "third", *common, third.Choices(model), batch_then=96, images_then=then)
        for model in third.MODELS
    ]


def images_a_second(network: str, size: tuple[int, int]) -> float:
    """Return how many images a second an H100 trains with; NaN where the network was not measured.

    From `data/bench/training_step_h100.csv`, the rows of the published batch as the `paper` profile trains on a GPU: in
    bfloat16, channels last, not compiled. They are of the steps alone: in a training other processes read and augment
    meanwhile. Another size counts by its pixels.
    """
    path = project_root() / "data" / "bench" / "training_step_h100.csv"
    if network not in bench.NETWORKS or not path.exists():
        return float("nan")
    *_, measured, images = bench.NETWORKS[network]
    table = pd.read_csv(path)
    chosen = table["bf16"] & table["channels_last"] & ~table["compiled"]
    chosen &= (table["network"] == network) & (table["images"] == images)
    rates = table.loc[chosen, "images a second"]
    return float(rates.iloc[-1] * np.prod(measured) / np.prod(size)) if len(rates) else float("nan")


def runs(edition: str = EDITIONS[0], profile: str = "paper") -> pd.DataFrame:
    """Return the table: a row a training; ``report:`` columns quote its own re-run, which had other GPUs.

    ``hours``: what the steps take on an H100 at the measured rate (:func:`images_a_second`), where layers are frozen
    less than that; NaN where no rate was measured.
    """
    table = []
    for row in rows(profile):
        rate = images_a_second(row.network, row.size) if profile == "paper" else float("nan")
        table.append(
            {
                "run": row.name,
                "network": row.network,
                "size": f"{row.size[0]} x {row.size[1]}",
                "batch": row.batch,
                "epochs": row.epochs,
                "images": row.images,
                "with": "extra photographs" if row.extra else "pseudo labels" if row.needs else "",
                "edition": edition,
                "hours": row.images / rate / 3600,
                "report: batch": row.batch_then,
                "report: images": row.images_then,
                "report: hours": row.hours,
            }
        )
    whole = ["epochs", "report: batch", "report: images"]
    return pd.DataFrame(table).astype(dict.fromkeys(whole, "Int64"))


def select(patterns: Iterable[str] = (), folds: Iterable[int] = (), profile: str = "paper") -> list[Row]:
    """Return the rows whose names match one of the patterns, all without any, in the table's order.

    Args:
        patterns: such as "4.2/a" and "5.2/*".
        folds: of the landmark detectors among them; without patterns these alone.
        profile: whose table.

    Raises:
        PaperError: a pattern or a fold matches nothing; the message lists the names.
    """
    patterns, folds, table = list(patterns), list(folds), rows(profile)
    names = ", ".join(row.name for row in table)
    for pattern in patterns:
        if not any(fnmatchcase(row.name, pattern) for row in table):
            raise PaperError(f"no run matches {pattern!r}; there are {names}")
    chosen = [
        row
        for row in table
        if any(fnmatchcase(row.name, one) for one in patterns or ["*"])
        and (not folds or row.fold in folds or (row.fold is None and patterns))
    ]
    if missing := set(folds) - {row.fold for row in chosen}:
        raise PaperError(
            f"no landmark detector of fold {min(missing)} among the chosen runs; there are {names}"
        )
    return chosen


def with_batch(row: Row, images: int) -> Row:
    """Return a row with another batch.

    Raises:
        PaperError: the recipe has no such choice, or its batches are made of fours.
    """
    name = BATCH_CHOICES.get(row.recipe)
    if row.choices is None or name not in {each.name for each in fields(row.choices)}:
        raise PaperError(
            f"{row.name}: batch = {images}: this training's batch of {row.batch} can't be chosen"
        )
    if images < 4 or images % 4:
        raise PaperError(f"{row.name}: batch = {images}: give a multiple of 4")
    value = images // 4 if name == "quadruplets" else images
    return replace(row, batch=images, choices=replace(row.choices, **{name: value}))


def data_of(row: Row, settings: Settings, *, extra: Path | str | None = None, boxes: str = "found") -> Run:
    """Return a run on the photographs that a row is trained on.

    Args:
        row: of the table.
        settings: with the data.
        extra: a folder with train.csv and train/ of an earlier contest, for the row that takes its photographs too
            (Table 3.2, second model); default "earlier" beside the data, where a generated world has it.
        boxes: "found" by the detectors, or supplied; "true": see :func:`marked`.

    Raises:
        PaperError: no such choice; or there is no folder of extra photographs.
    """
    if boxes not in BOXES:
        raise PaperError(f"boxes = {boxes!r}: choose one of {', '.join(BOXES)}")
    run = Run("paper", settings)
    ready([row], run.catalog, extra)
    if row.extra:
        run.catalog = with_extra(run.catalog, extra_folder(run.catalog, extra))
    if boxes == "true" and row.recipe in RECIPES:
        run.catalog = marked(run.catalog, place("WHALE_CACHE", "data/cache"))
    return run


def extra_folder(catalog: Catalog, extra: Path | str | None = None) -> Path:
    """Return where an earlier contest's photographs are: the folder given, or "earlier" beside the data."""
    return Path(extra) if extra else catalog.root / "earlier"


def ready(
    chosen: Iterable[Row], catalog: Catalog, extra: Path | str | None = None, *, asked: bool = True
) -> list[Row]:
    """Return the rows whose photographs are there.

    Args:
        chosen: rows of the table.
        catalog: of the data.
        extra: as of :func:`data_of`.
        asked: by name; else a row that lacks photographs is left out, and a line says so.

    Raises:
        PaperError: a row that was asked for lacks photographs; the message says how to give them.
    """
    folder, found = extra_folder(catalog, extra), []
    for row in chosen:
        if not row.extra or folder.is_dir():
            found.append(row)
            continue
        lacks = (
            f"{row.name} takes labelled photographs of an earlier contest too (train.csv, train/): give their folder "
            f"with --extra, or have it as {catalog.root / 'earlier'}; {folder} is none"
        )
        if asked:
            raise PaperError(lacks)
        print(f"left out: {lacks}", flush=True)
    return found


def with_extra(catalog: Catalog, folder: Path) -> Catalog:
    """Return a catalog with another folder's labelled photographs among those to train on (section 3.4.1)."""
    other = open_catalog(folder).verified()
    table = pd.concat([catalog.table, other.train.table], ignore_index=True)
    problems = pd.concat([catalog.problems, other.problems], ignore_index=True)
    return replace(catalog, table=table, problems=problems)


def marked(catalog: Catalog, folder: Path) -> Catalog:
    """Return a catalog as if someone had supplied boxes, masks and landmarks with it, so that no detector is needed.

    A generated world's are its truth, other data's what they bring. Where there is none: the whole photograph, an empty
    mask, and landmarks as a standard fluke has them. What is true is printed. A trial takes it, whose steps are the
    same whatever the boxes; for a training it is an upper bound of what better detectors would give.

    Args:
        catalog: of the data.
        folder: the cache, for the picture of an empty mask.
    """
    root = folder / f"marked-{catalog.fingerprint}"
    blank = root / "blank.png"
    if not blank.exists():
        with replacing(blank) as part:
            Image.new("L", (8, 8)).save(part)
    table = catalog.table.copy()
    sides = statistics(catalog)[["width", "height"]].to_numpy(dtype=float)
    whole = np.concatenate([np.zeros_like(sides), sides], 1)
    standard = landmarks.REFERENCE_POINTS / landmarks.SIDE * sides[:, None]
    box, points = (
        table.reindex(columns=list(columns)).to_numpy(dtype=float) for columns in (BOX, landmarks.COLUMNS)
    )
    cut = box.clip(0, np.tile(sides, 2))
    bare = ~((cut[:, :2] < cut[:, 2:]).all(axis=1))  # also where it is missing
    unmarked = np.isnan(points).any(axis=1)
    limit = np.tile(sides - 1, len(landmarks.LANDMARKS))
    table[list(BOX)] = np.where(bare[:, None], whole, cut)
    table[list(landmarks.COLUMNS)] = np.where(
        unmarked[:, None], standard.reshape(len(table), -1), points.clip(0, limit)
    )
    masks = table["mask"] if "mask" in table else pd.Series(pd.NA, index=table.index, dtype="str")
    table["mask"] = masks.fillna(str(blank))
    print(
        f"boxes: {(~bare).sum():,} of {len(table):,} supplied or true, the others the whole photograph; "
        f"masks {masks.notna().sum():,}; landmarks {(~unmarked).sum():,}"
    )
    # What was measured of the photographs holds for them under their new root too.
    old, new = (folder / f"statistics-{cache_key(each)}.csv" for each in (catalog.root, root))
    if old.exists():
        shutil.copy(old, new)
    return replace(catalog, table=table, root=root)  # no longer a world, whose truth is never supplied


def trained(row: Row, run: Run):
    """Train a row's network on a run's data, or fetch it from the cache, or go on where a killed run stopped.

    Returns:
        What the recipe returns: a network with photographs and history; of a detector its network alone.
    """
    if row.recipe in RECIPES:
        return RECIPES[row.recipe].trained(run, row.choices)
    if row.recipe == "landmarks":
        return landmarks.landmark_model(run, row.part)
    if row.recipe == "keypoints":
        world = Run(
            run.notebook, Settings(data=locate.WORLD, seed=run.settings.seed, device=run.settings.device)
        )
        return keypoints.point_model(world, row.part, keypoints.PLANS[run.settings.profile])
    return locate.mask_model(run)


def attempt(
    row: Row, settings: Settings, steps: int, *, extra: Path | str | None = None
) -> dict[str, object]:
    """Make some real steps of a row's training, keep nothing of it, and return what they took.

    Boxes, masks and landmarks are taken as :func:`marked` gives them, so that no detector has to be trained first. A
    network with pseudo labels is tried without them, for they need another one: they change which photographs there
    are, not what a step does.

    Args:
        row: of the table.
        settings: with the data.
        steps: of the optimizer, from 1.
        extra: as of :func:`data_of`.

    Returns:
        ``steps``; ``whales``, in the data; the ``losses``; ``seconds`` a step, but of the first, NaN of one step;
        ``GiB`` at the peak: of the process on a CPU, of what torch held on a GPU; the ``device``.

    Raises:
        PaperError: fewer than one step.
    """
    if steps < 1:
        raise PaperError(f"steps = {steps}: give 1 or more")
    if row.needs:
        print(
            f"{row.name}: tried without pseudo labels, which need {row.needs[0]} trained; a step is the same"
        )
        row = replace(row, choices=replace(row.choices, pseudo=False))
    run, cache = data_of(row, settings, extra=extra), place("WHALE_CACHE", "data/cache")
    known = len(run.catalog.known)
    with tempfile.TemporaryDirectory(prefix="trial-", dir=cache) as folder:
        for path in cache.glob("statistics-*.csv"):  # of the photographs' files
            shutil.copy(path, folder)
        with environment({"WHALE_CACHE": folder}):
            if row.recipe in RECIPES:
                run.catalog = marked(run.catalog, Path(folder))
            try:
                with trial(steps):
                    trained(row, run)
            except TrialEnded as ended:
                later = ended.steps - 1
                return {
                    "steps": ended.steps,
                    "whales": known,
                    "losses": [round(loss, 3) for loss in ended.losses],
                    "seconds": ended.seconds / later if later else float("nan"),
                    "GiB": bench.peak_memory(run.device),
                    "device": run.device_name,
                }
    raise RuntimeError(f"{row.name}: the training ended before {steps} steps")


def summary(row: Row) -> str:
    """Return what a row is, on one line."""
    of = f"{row.network}, batches of {row.batch} images of {row.size[0]} x {row.size[1]}"
    return f"{row.name}: the {row.recipe} recipe, {of}" if row.recipe in RECIPES else f"{row.name}: {of}"


def one(row: Row, settings: Settings, chosen: argparse.Namespace) -> None:
    """Do what the command line asks of one row, in this process."""
    published = row.batch
    if chosen.batch:
        row = with_batch(row, chosen.batch)
    if chosen.images != 1 and row.choices is not None:
        row = replace(row, choices=replace(row.choices, images=chosen.images))
    print(summary(row) + (f" (published: {published})" if row.batch != published else ""), flush=True)
    if chosen.steps:
        found = attempt(row, settings, chosen.steps, extra=chosen.extra)
        many = found["steps"] > 1
        took = f"{found['steps']} steps, {found['seconds']:.1f} s each but the first" if many else "1 step"
        about = f"losses {found['losses']}, {found['whales']:,} whales, {found['GiB']:.1f} GiB at the peak"
        print(f"{row.name}: {took}, {about}", flush=True)
        if chosen.table:
            asked = {
                "run": row.name,
                "network": row.network,
                "size": "{} x {}".format(*row.size),
                "batch": row.batch,
                "edition": settings.edition,
            }
            bench.keep(chosen.table, [asked | found], add=True)
        return
    began = time.monotonic()
    made = trained(row, data_of(row, settings, extra=chosen.extra, boxes=chosen.boxes))
    took = f"{(time.monotonic() - began) / 3600:.2f} h now"
    if hasattr(made, "history"):
        last = made.history.iloc[-1]
        took += f"; {made.history['images'].sum():,.0f} images, loss {last['loss']:.3f} in the last epoch"
    print(f"{row.name}: trained, {took}", flush=True)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m whalelib.paper", description=__doc__.split("\n", maxsplit=1)[0], allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    table = commands.add_parser("list", help="print the table of runs")
    run = commands.add_parser("run", help="train, go on, or try", allow_abbrev=False)
    for command in (table, run):
        command.add_argument("--edition", choices=EDITIONS, default=EDITIONS[0])
        command.add_argument("--profile", choices=PROFILES, default="paper")
    run.add_argument("--model", nargs="*", default=[], help='names of runs, as "4.2/a 5.2/*" (default: all)')
    run.add_argument("--fold", nargs="*", default=[], help="of the landmark detectors")
    run.add_argument("--data", default="world", help="world[:PRESET[@SEED]], kaggle, or a path")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default="auto", help="auto, cpu or cuda")
    run.add_argument("--steps", type=int, default=0, help="a trial: so many steps, and nothing is kept")
    run.add_argument("--table", help="of data/bench/: a trial adds a row to it")
    run.add_argument("--batch", type=int, help="images, in place of the published number")
    run.add_argument("--images", type=float, default=1.0, help="times the budget (default 1)")
    run.add_argument("--boxes", choices=BOXES, default=BOXES[0], help="true: the world's, a trial's default")
    run.add_argument("--extra", type=Path, help="folder of an earlier contest's photographs, for 3.2/2")
    return parser.parse_args(given)


def words(given: Iterable[str]) -> list[str]:
    """Return the words of arguments, also where several came as one: "4.2/a 5.2/*"."""
    return " ".join(given).replace(",", " ").split()


def folds_of(given: Iterable[str]) -> list[int]:
    """Return the folds that arguments name.

    Raises:
        PaperError: one is no whole number.
    """
    if bad := [word for word in words(given) if not word.isdecimal()]:
        raise PaperError(f"fold = {bad[0]!r}: give whole numbers from 0 up")
    return [int(word) for word in words(given)]


def settings_of(chosen: argparse.Namespace) -> Settings:
    """Return the settings that a command line gives.

    Raises:
        PaperError: one makes no sense.
    """
    try:
        return Settings(chosen.data, chosen.profile, chosen.edition, chosen.seed, chosen.device)
    except ValueError as error:
        raise PaperError(str(error)) from error


def main(given: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 all went well, 1 a run failed, 2 it can't be met as asked."""
    chosen = _arguments(given)
    if chosen.command == "list":
        table = runs(chosen.edition, chosen.profile)
        shown = table.to_string(index=False, na_rep="-", float_format="{:.1f}".format)
        print(shown.replace("<NA>", "   -"))
        print(
            "hours: of the steps alone on an H100, from their measured rate; report: as it says of its own runs"
        )
        return 0
    try:
        if chosen.table and not chosen.steps:
            raise PaperError("a row of a table (TABLE, --table) is of a trial: give STEPS, --steps, too")
        picked = select(words(chosen.model), folds_of(chosen.fold), chosen.profile)
        settings = settings_of(chosen)
        if len(picked) == 1:
            one(picked[0], settings, chosen)
            return 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise PaperError(
                f"several processes (torchrun) train one run, not {len(picked)}: choose it with --model"
            )
        if any(row.extra for row in picked):
            asked = bool(chosen.model or chosen.extra)
            picked = ready(picked, open_catalog(settings.source), chosen.extra, asked=asked)
        # Each in a process of its own: its peak of memory is its own, and one that fails stops no other.
        arguments = list(sys.argv[1:] if given is None else given)
        failed = [row.name for row in picked if _apart(row, arguments)]
    except (PaperError, CatalogError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from there", file=sys.stderr)
        return 130
    if failed:
        print(f"{len(failed)} of {len(picked)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _apart(row: Row, arguments: list[str]) -> int:
    """Do one of several rows that the command line asked for, and return its exit code."""
    command = [sys.executable, "-m", "whalelib.paper", *arguments, "--model", row.name, "--fold"]
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
