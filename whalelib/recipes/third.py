"""The third place solution of Park (chapter 5 of the report), from photographs to five guesses.

A box and four landmarks of each fluke, crops that are aligned half of the time, the augmentations of Table 5.1, every
photograph a second time mirrored as a whale of its own, DenseNet-121 and an embedding trained with ArcFace alone, the
mean of the last weights, a template for each whale, and cosines: of photograph to template and of mirror image to
mirrored template, averaged over three networks.

Editions. Where the report says nothing, both do what the solution's code does. Where report and code contradict each
other, `as_described` follows the report, its slips mended, and `as_shipped` the code.
"""

import argparse
import hashlib
import inspect
import json
import sys
import time
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader, Dataset

from whalelib import augment, landmarks, weights
from whalelib.contest import Contest
from whalelib.data import NEW_WHALE, Catalog, statistics
from whalelib.data.batches import Portions, Shuffled
from whalelib.data.layouts import BOX
from whalelib.data.photographs import as_tensor
from whalelib.identify import (
    centre,
    embed,
    expected_threshold,
    hold_out,
    pair_split,
    template_similarity,
    templates,
    threshold_curve,
    top5,
)
from whalelib.keypoints import PointedPhotographs
from whalelib.ledger import append_ledger, rows_of
from whalelib.losses import add_margin, cross_entropy, without_mirrored
from whalelib.metrics import map_at_k
from whalelib.models import SENET154_MEAN, SENET154_STD, ThirdPlace, densenet121
from whalelib.postprocess import read_ids
from whalelib.recipes import baseline, first
from whalelib.recipes.baseline import Answer
from whalelib.recipes.first import Mirrored
from whalelib.run import Run, Settings, add_run_arguments, by_profile
from whalelib.train import average_weights, fit

SIZES = by_profile((128, 128), (320, 320))  # (H, W)
FRAMES = by_profile((128, 224), (480, 800))  # (H, W) that a whole photograph is kept in before it is cropped
BATCH = 32
MARGIN = 0.5  # radians
EPOCHS = by_profile(20, 500)
RATE = by_profile(1e-3, 5e-4)
NEW_RATE = by_profile(10, 1)  # times that, for what starts from nothing
SNAPSHOTS = by_profile((1, 3), (2, 10))  # every so many epochs; how many of them are averaged
# A training of minutes still falls at its end: the mean of its last weights lies behind them (notebook 05_11).
AVERAGE = by_profile(False, True)
THRESHOLD = 0.385  # of new_whale, as shipped

# Table 5.2: milestones as shares of the training, where the rate is halved; times the highest rate; class grouping.
MODELS = {"1": ((0.5, 0.7), 1, False), "2": ((0.3, 0.4), 1, False), "3": ((0.3, 0.4), 0.5, True)}

# What an ablation may leave out.
PARTS = ("mirrored whales",)


class Flukes(Dataset):
    """Photographs cropped about the fluke, and aligned or not (sections 5.1.1 and 5.2.4).

    In training, item i of 2N is a photograph, and from N on its mirror image, which is another whale: augmented whole,
    with its box and landmarks, then cropped and, half of the time, aligned, all with draws of (seed, epoch, i) alone.
    Otherwise item i of N is the photograph, cropped. An item is a dict: ``image`` (3, H, W) float32 RGB, 0 to 1;
    ``label``, the whale's place in ``known``, plus C of the mirrored one, -1 for no such whale; ``index``.

    Args:
        catalog: N photographs with boxes and landmarks.
        size: (H, W) of the items, a square.
        frame: (H, W) in which whole photographs are kept.
        known: the C whales.
        transform: of training; None for validation and test.
        aligned: share of the items that are aligned: in training usually .5, else 0 or 1.
        seed: of the draws.
        turns: degrees clockwise by name, of photographs to be turned (section 5.2.1); not in training.
        edition: of the turn, see :func:`landmarks.turned`.
        folder: where decoded photographs are kept.
    """

    def __init__(
        self,
        catalog: Catalog,
        size: tuple[int, int],
        frame: tuple[int, int],
        known: Sequence[str],
        *,
        transform=None,
        aligned: float = 0,
        seed: int = 0,
        turns: Mapping[str, int] | None = None,
        edition: str = "as_described",
        folder: Path | None = None,
    ):
        self.photographs = PointedPhotographs(catalog, frame, known=list(known), seed=seed, folder=folder)
        self.catalog, self.size, self.transform, self.aligned = catalog, size, transform, aligned
        self.seed, self.epoch, self.edition = seed, 0, edition
        shape = statistics(catalog)[["height", "width"]].to_numpy(dtype=float)
        self.boxes, self.points = landmarks.shares(catalog.table, shape)
        self.turns = [(turns or {}).get(name, 0) for name in catalog.table["image"]]
        own = self.photographs.labels
        mirrored = np.where(own < 0, -1, own + len(known))
        self.labels = own if transform is None else np.concatenate([own, mirrored])

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return item ``index`` as the class says."""
        index = range(len(self))[index]
        image = self._plain(index) if self.transform is None else self._augmented(index)
        return {"image": as_tensor(image), "label": int(self.labels[index]), "index": index}

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, whose draws the items show."""
        self.epoch = epoch

    def plain(self, aligned: float | None = None) -> "Flukes":
        """Return the photographs without augmentation, each once; what was decoded is shared.

        aligned: 0 or 1; default as they are, those of training not.
        """
        other = copy(self)
        other.transform, other.labels = None, self.photographs.labels
        if aligned is not None or self.transform is not None:
            other.aligned = aligned or 0
        return other

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the items."""
        transform = None if self.transform is None else self.transform.to_dict()
        found = [self.boxes.tolist(), self.points.tolist(), self.turns, self.edition]
        parts = [self.photographs.fingerprint, self.size, transform, self.aligned, self.seed, found]
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    def _whole(self, place: int) -> np.ndarray:
        height, width = self.photographs.inner[place]
        return self.photographs.pixels(place)[:height, :width]

    def _plain(self, place: int) -> np.ndarray:
        image, box, points = self._whole(place), self.boxes[place], self.points[place]
        if self.turns[place]:
            image, box, points = landmarks.turned(image, box, points, self.turns[place], self.edition)
        return self._cropped(image, points, landmarks.crop_of(box, points), bool(self.aligned))

    def _augmented(self, index: int) -> np.ndarray:
        place = index % len(self.photographs)
        image, points = self._whole(place), self.points[place]
        (x, y), sides = self.boxes[place, :2], self.boxes[place, 2:]
        corners = np.array([(x, y)]) + np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * sides / 2
        if index >= len(self.photographs):
            image = np.ascontiguousarray(image[:, ::-1])
            points, corners = (
                part * (-1, 1) + (1, 0) for part in (points[list(landmarks.MIRRORED)], corners)
            )
        sides, key = np.array(image.shape[1::-1]), (self.seed, self.epoch, index)
        both = np.concatenate([points, corners]) * sides
        changed = augment.augmented(self.transform, key, image=image, keypoints=both)
        both = changed["keypoints"] / sides
        points, low, high = both[: len(points)], both[len(points) :].min(0), both[len(points) :].max(0)
        draws = np.random.default_rng([*key, 1])
        crop = landmarks.crop_of(np.concatenate([(low + high) / 2, high - low]), points, draws)
        points = landmarks.jittered(points, draws)
        return self._cropped(changed["image"], points, crop, draws.random() < self.aligned)

    def _cropped(self, image: np.ndarray, points: np.ndarray, crop: np.ndarray, align: bool) -> np.ndarray:
        x0, y0, x1, y1 = landmarks.crop_pixels(crop, np.array(image.shape[:2])).astype(int)
        side = self.size[0]
        piece = cv2.resize(image[y0:y1, x0:x1], (side, side))
        return landmarks.aligned(piece, landmarks.within(points, crop) * side, side) if align else piece


def loss(output: dict, batch: dict, *, margin: float = MARGIN) -> dict[str, torch.Tensor]:
    """Return ArcFace's loss, the only one (section 5.3.2), with the whale's mirror image taken out of it."""
    labels, cosines = batch["label"], output["cosines"]
    logits = without_mirrored(ThirdPlace.SCALE * add_margin(cosines, labels, margin), labels)
    return {
        "loss": cross_entropy(logits, labels),
        "right": (cosines.detach().argmax(1) == labels).float().mean(),
    }


def optimizer(model: ThirdPlace, rate: float = 5e-4, new: float = 1) -> torch.optim.Optimizer:
    """Return Adam with weight decay 5e-4 in the gradient, over everything.

    rate: of the backbone; new: times that, for neck and directions, which start from nothing.
    """
    fresh = [*model.neck.parameters(), model.directions]
    groups = [{"params": list(model.backbone.parameters())}, {"params": fresh, "lr": rate * new}]
    return torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.999), weight_decay=5e-4)


def network(profile: str, identities: int, seed: int, size: tuple[int, int] | None = None) -> ThirdPlace:
    """Return the network of a profile: EfficientNet-Lite0 on a laptop (`lab`), DenseNet-121 as in the report (`paper`).

    DenseNet-121's ImageNet weights are those that :func:`whalelib.weights.found` finds; without them a warning says
    where to get them, and the network starts from random ones.
    """
    size = size or SIZES[profile]
    if profile != "paper":
        return ThirdPlace(identities, size=size, seed=seed)
    pixels = {"mean": SENET154_MEAN, "std": SENET154_STD}
    found = weights.pretrained("densenet121")
    backbone = densenet121(found, sha256=weights.known("densenet121"), seed=seed)
    return ThirdPlace(identities, backbone, size=size, seed=seed, **pixels)


@dataclass(frozen=True)
class Choices:
    """What a network may be trained with besides the profile's and the edition's.

    model: of Table 5.2; margin: ArcFace's, radians; batch: images; images: share of the budget; aligned: share of the
    crops; average: the last weights, or take the last alone, default as the profile does; size: (H, W); without: some
    of PARTS.

    Raises:
        ValueError: no such part.
    """

    model: str = "1"
    margin: float = MARGIN
    batch: int = BATCH
    images: float = 1.0
    aligned: float = 0.5
    average: bool | None = None
    size: tuple[int, int] | None = None
    without: tuple[str, ...] = ()

    def __post_init__(self):
        first.check_choices(self, PARTS)


@dataclass(frozen=True)
class Parts:
    """The photographs as the recipe takes them, all with boxes and landmarks.

    rest: known whales to train on; held: pairs of known whales, and new whales, to validate with; gallery: all known
    whales, for the templates; strangers: all new whales; queries: to name; versions: of each fold of the landmark
    detector, where there are several, what it finds alone, indexed by photograph.
    """

    rest: Catalog
    held: Catalog
    gallery: Catalog
    strangers: Catalog
    queries: Catalog
    size: tuple[int, int]
    frame: tuple[int, int]
    edition: str
    seed: int
    versions: tuple[pd.DataFrame, ...] = ()

    @property
    def known(self) -> list[str]:
        """The whales, in the order of the classes."""
        return self.rest.known

    def flukes(self, part: Catalog, **options) -> Flukes:
        """Return the items of one of the parts."""
        chosen = {"seed": self.seed, "turns": landmarks.TURNS, "edition": self.edition, **options}
        return Flukes(part, self.size, self.frame, self.known, **chosen)

    def views(self, part: Catalog) -> list[Flukes]:
        """Return the items of one of the parts by the ensemble's boxes and landmarks, and by those of each fold."""
        found = [part]
        for version in self.versions:
            columns = version.loc[part.table["image"]].reset_index(drop=True)
            found.append(replace(part, table=part.table.assign(**columns)))
        return [self.flukes(each) for each in found]


def parts(run: Run, size: tuple[int, int] | None = None) -> Parts:
    """Find boxes and landmarks in the run's data, and part the photographs as the solution does."""
    located, settings = landmarks.located(run), run.settings
    rest, held = pair_split(located.train)
    sizes = size or SIZES[settings.profile], FRAMES[settings.profile]
    strangers = located.train.where((located.train.table["identity"] == NEW_WHALE).to_numpy())
    gallery = baseline.named(located.train), strangers
    folds = landmarks.PLANS[settings.profile].folds
    versions = [landmarks.located(run, fold=fold).table for fold in range(folds)] if folds > 1 else []
    columns = [*BOX, *landmarks.COLUMNS]
    versions = tuple(table.set_index("image")[columns] for table in versions)
    return Parts(rest, held, *gallery, located.test, *sizes, settings.edition, settings.seed, versions)


# Labels to train on, beside the photographs: Image, Id. The second list of the solution's code has this name.
GROUPED = "train.v2.csv"


def grouped(here: Parts) -> Parts:
    """Return the parts with the labels of GROUPED, if there are any, to train on (section 5.2.2).

    Photographs that it does not list keep their labels; one of a new whale that it gives an id is trained on too, but
    those held out. As shipped the list is not read, whatever is asked for. Templates keep the whales' own names.

    Raises:
        CatalogError: the file can't be used; the message names it and its rows.
    """
    path = here.rest.root / GROUPED
    if here.edition == "as_shipped" or not path.is_file():
        return here
    pool = pd.concat([here.rest.table, here.strangers.table], ignore_index=True)
    everyone = {*here.gallery.table["image"], *here.strangers.table["image"]}
    ids = read_ids(path, everyone, kind="a training photograph")
    identity = pool["image"].map(ids).fillna(pool["identity"])
    unseen = set(here.held.table["image"]) - set(here.rest.table["image"])
    learnt = (identity != NEW_WHALE) & ~pool["image"].isin(unseen)
    table = pool.assign(identity=identity)[learnt].reset_index(drop=True)
    return replace(here, rest=replace(here.rest, table=table))


def rate_factor(position: float, epochs: int, milestones: tuple[float, ...]) -> float:
    """Return the learning rate's factor at a position in so many epochs: halved at each milestone (section 5.3.3)."""
    return 0.5 ** sum(position >= share * epochs for share in milestones)


def accumulated(epoch: int) -> int:
    """Return how many batches make a step: two in the first three epochs, as shipped; the report is silent."""
    return 2 if epoch < 3 else 1


def trained(run: Run, choices: Choices | None = None) -> first.Trained:
    """Train a network, or fetch it from the cache, or go on where a killed run stopped.

    It sees as many images as the baseline of notebook 01_02 does of the same data, in twenty epochs, and the last
    weights are taken. Under `paper` it sees every photograph and its mirror image five hundred times instead, and the
    mean is taken of ten files, two epochs apart, up to where the mean of the last twenty validations is best.
    """
    choices, settings = _chosen(run, choices), run.settings
    here = _parts(run, choices)
    folder = _folder(run, choices, here)
    model = network(settings.profile, len(here.known), settings.seed, here.size).to(run.device)
    history = first.trained_or_kept(model, folder, lambda: _train(run, choices, model, here, folder))
    return first.Trained(model, here, history)


def snapshots(run: Run, choices: Choices | None = None) -> list[Path]:
    """Return the files of weights that a trained network is or could be the mean of, in the order of training."""
    choices = replace(_chosen(run, choices), average=False)
    folder = _folder(run, choices, _parts(run, choices))
    kept = "best-snapshots" if run.settings.profile == "paper" else "snapshots"
    return sorted((folder / kept).glob("*.safetensors"))


def _parts(run: Run, choices: Choices) -> Parts:
    here = parts(run, choices.size)
    return grouped(here) if MODELS[choices.model][2] else here


def _chosen(run: Run, choices: Choices | None) -> Choices:
    choices = choices or Choices()
    return replace(choices, average=AVERAGE[run.settings.profile]) if choices.average is None else choices


def _folder(run: Run, choices: Choices, here: Parts) -> Path:
    given = run.settings.profile == "paper" and weights.content("densenet121")
    data = [part.fingerprint for part in (here.rest, here.held)]
    key = {**asdict(choices), "size": here.size, "weights": given, "photographs": data}
    key["budget"] = budget(run.settings.profile, here)
    crops = (
        landmarks.crop_of,
        landmarks.crop_pixels,
        landmarks.jittered,
        landmarks.within,
        landmarks.aligned,
    )
    modules = map(inspect.getmodule, (Shuffled, first.trained, trained))
    return run.folder("third", code=baseline.training_code(PointedPhotographs, *crops, *modules), **key)


def _train(run: Run, choices: Choices, model: ThirdPlace, here: Parts, folder: Path) -> pd.DataFrame:
    if choices.average:
        return _average(run, choices, model, here)
    profile, edition, seed = run.settings.profile, run.settings.edition, run.settings.seed
    pixels = baseline.pixels_folder()
    transform = augment.third_place(here.frame, edition)
    data = here.flukes(here.rest, transform=transform, aligned=choices.aligned, folder=pixels)
    held = here.flukes(here.held, folder=pixels)
    items = len(here.rest) if "mirrored whales" in choices.without else len(data)
    milestones, slower, _ = MODELS[choices.model]
    epochs, paper = EPOCHS[profile], profile == "paper"
    portion = max(1, round(budget(profile, here) * choices.images / choices.batch / epochs))
    history = fit(
        model,
        data,
        partial(loss, margin=choices.margin),
        epochs=epochs,
        folder=folder,
        batch_size=choices.batch,
        optimizer=partial(optimizer, rate=RATE[profile] * slower, new=NEW_RATE[profile]),
        schedule=partial(rate_factor, epochs=epochs, milestones=milestones),
        accumulate=accumulated if paper else 1,
        sampler=Portions(Shuffled(items, choices.batch, seed), portion),
        seed=seed,
        **run.resources,
        on_epoch=partial(_validate, held=held, every=SNAPSHOTS[profile][0] if paper else epochs),
        best=mean_score if paper else None,
        snapshots=SNAPSHOTS[profile],
        settings={"choices": asdict(choices), "portion": portion},
    )
    return history.assign(images=history["steps"] * choices.batch)


def _average(run: Run, choices: Choices, model: ThirdPlace, here: Parts) -> pd.DataFrame:
    """Give the model the mean of the files that the same training without an average keeps."""
    last = trained(run, replace(choices, average=False))
    plain = here.flukes(here.rest, folder=baseline.pixels_folder())
    images = DataLoader(plain, batch_size=choices.batch, drop_last=len(plain) >= choices.batch)
    average_weights(model, snapshots(run, choices), (batch["image"] for batch in images))
    return last.history


def budget(profile: str, parts: Parts) -> int:
    """Return how many images the recipe may see: the baseline's, or under `paper` those of EPOCHS passes."""
    if profile != "paper":
        return baseline.budget(profile, hold_out(parts.gallery, seed=parts.seed)[0])
    return EPOCHS[profile] * 2 * len(parts.rest)


def _validate(model: ThirdPlace, row: dict, *, held: Flukes, every: int) -> dict:
    """Return the score on held-out photographs, after every so many epochs."""
    return {} if row["epoch"] % every else {"valid MAP@5": held_score(model, held)}


def mean_score(rows: list[dict]) -> float:
    """Return the mean of the last twenty validations: where it is highest, the last files are kept (section 5.3.3)."""
    found = [row["valid MAP@5"] for row in rows if "valid MAP@5" in row][-20:]
    return float(np.mean(found)) if found and "valid MAP@5" in rows[-1] else -np.inf


def held_score(model: ThirdPlace, held: Flukes) -> float:
    """Return MAP@5 on held-out photographs, each named by the nearest of the others, at the best of five thresholds."""
    rows = embed(model, held)
    truth = held.catalog.table["identity"].to_numpy(dtype=object)
    cosine = rows @ rows.T
    np.fill_diagonal(cosine, -1)
    whales = sorted({*truth} - {NEW_WHALE})
    nearest = np.stack([cosine[:, truth == name].max(1) for name in whales], 1)
    return max(map_at_k(top5(nearest, whales, limit), truth) for limit in (0.40, 0.38, 0.36, 0.34, 0.32))


def features(
    model: ThirdPlace, flukes: Flukes | Sequence[Flukes], *, mirrored: bool = True, aligned: bool = True
) -> np.ndarray:
    """Return (2, N, V, D): of photographs and of their mirror images, V views each (section 5.4).

    Plain and aligned, by each version of boxes and landmarks: two views of one version, twelve of `Parts.views` where
    the detector has five folds.

    flukes: the photographs; or the same ones by several versions. mirrored, aligned: False leaves these out.
    """
    versions = [flukes] if isinstance(flukes, Flukes) else flukes
    crops = [version.plain(a) for version in versions for a in (0, 1)[: 1 + aligned]]
    views = (model, Mirrored(model))[: 1 + mirrored]
    return np.stack([np.stack([embed(view, crop) for crop in crops], 1) for view in views])


def similarity(
    trained: first.Trained,
    queries: Catalog | None = None,
    gallery: Catalog | None = None,
    *,
    mirrored: bool = True,
    aligned: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Return how near each query is to each whale's template: (Q, C), and the whales (C,).

    queries, gallery: photographs with boxes and landmarks; default the network's parts of these names. mirrored: by
    mirror images too; aligned: by aligned crops too.
    """
    here = trained.parts
    gallery = here.gallery if gallery is None else gallery
    asked, known = (
        features(trained.model, here.views(part), mirrored=mirrored, aligned=aligned)
        for part in (here.queries if queries is None else queries, gallery)
    )
    return _nearness(asked, known, gallery.table["identity"])


def _nearness(asked: np.ndarray, known: np.ndarray, names: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Return how near features are to the templates of others, whose whales have these names; and the whales."""
    found = [templates(view, names) for view in known]
    return template_similarity(centre(asked), np.stack([each for each, _ in found])), found[0][1]


BY = ("share", "held")


def answer(networks: first.Trained | Sequence[first.Trained], by: str = "share", **views: bool) -> Answer:
    """Name the queries' whales by the nearest templates, with one network or several whose cosines are averaged.

    See :func:`answers`, which gives all ways at the price of one.
    """
    if by not in BY:
        raise ValueError(f"by = {by!r}: choose one of {', '.join(BY)}")
    return answers(networks, (by,), **views)[by]


def answers(
    networks: first.Trained | Sequence[first.Trained], ways: Sequence[str] = BY, **views: bool
) -> dict[str, Answer]:
    """Name the queries' whales in several ways of BY; views: as :func:`similarity` takes them.

    Where ``new_whale`` comes. By "share", as the solution (section 5.5): as described where it is the first guess of
    27.6 % of the queries, for which its .385 was chosen; as shipped before the first whale below .385. By "held", ours:
    at the threshold that is best on photographs that were not trained on, the pairs' second ones and all new whales.
    """
    networks = [networks] if isinstance(networks, first.Trained) else list(networks)
    here, found = networks[0].parts, {}
    parts = [here.gallery.table] + [here.strangers.table] * ("held" in ways)
    labelled = replace(here.gallery, table=pd.concat(parts, ignore_index=True))
    known, asked = (
        [features(one.model, here.views(part), **views) for one in networks]
        for part in (labelled, here.queries)
    )
    names = labelled.table["identity"]  # of new_whale there is no template
    cosine, whales = _mean([_nearness(*both, names) for both in zip(asked, known, strict=True)])
    usual = THRESHOLD if here.edition == "as_shipped" else expected_threshold(cosine)
    for by in ways:
        limit, held = _held(here, labelled, known) if by == "held" else (usual, float("nan"))
        found[by] = Answer(top5(cosine, whales, limit), float(limit), float(held), cosine, whales)
    return found


def _held(here: Parts, labelled: Catalog, known: Sequence[np.ndarray]) -> tuple[float, float]:
    """Return the threshold that is best on photographs that were not trained on, and MAP@5 there.

    known: features of the labelled photographs, by each network.
    """
    names = labelled.table["identity"]
    rest, held = (
        labelled.table["image"].isin(part.table["image"]).to_numpy() for part in (here.rest, here.held)
    )
    unseen = (held | (names == NEW_WHALE).to_numpy()) & ~rest
    cosine, whales = _mean([_nearness(rows[:, unseen], rows[:, rest], names[rest]) for rows in known])
    limits, scores = threshold_curve(cosine, whales, names[unseen].to_numpy(dtype=object))
    return limits[scores.argmax()], scores.max()


def _mean(found: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    return np.mean([cosine for cosine, _ in found], axis=0), found[0][1]


def main(arguments: list[str] | None = None) -> int:
    """Train some of Table 5.2's networks; enter their scores, and that of all together, in the ledger."""
    parser = argparse.ArgumentParser(prog="python -m whalelib.recipes.third", description=main.__doc__)
    add_run_arguments(parser)
    parser.add_argument("--models", default="1", help="of Table 5.2, such as 123 (default 1)")
    chosen = parser.parse_args(arguments)
    run = Run("05_14", Settings(data=chosen.data, edition=chosen.edition, seed=chosen.seed))
    contest = Contest.open(run.catalog)
    started, networks, scores = time.monotonic(), [], {}
    for name in chosen.models:
        networks.append(trained(run, Choices(model=name)))
        images = networks[-1].parts.queries.table["image"]
        for by, found in answers(networks[-1]).items():
            score = contest.score_guesses(images, found.guesses).all
            scores[f"MAP@5, model {name}, by {by}"] = score
    if len(networks) > 1:
        together = answer(networks).guesses
        scores[f"MAP@5, models {chosen.models}, by share"] = contest.score_guesses(images, together).all
    scores = {metric: round(score, 4) for metric, score in scores.items()}
    print(scores, flush=True)
    command, seconds = "python -m whalelib.recipes.third", time.monotonic() - started
    append_ledger(rows_of(run, scores, command=command, seconds=seconds), allow_dirty=chosen.allow_dirty)
    return 0


if __name__ == "__main__":
    sys.exit(main())
