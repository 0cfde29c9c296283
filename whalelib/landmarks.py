"""Where the fluke is and how it lies: four landmarks, boxes, alignment (report 5.1.1 and 5.2.1).

The third solution found a box and four landmarks in each photograph with five networks, each of which regresses both
from anchors in one step; an affine map brings the landmarks to where they are in a standard fluke. Published were the
code and what the networks found in the test photographs. Here they learn in the generated world, where the points are
known. Supplied landmarks and boxes take precedence.
"""

import inspect
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import combinations, combinations_with_replacement
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from whalelib import augment, keypoints, locate, weights
from whalelib.data import Catalog, read_image, statistics
from whalelib.data.catalog import refusal
from whalelib.data.layouts import BOX, Folder, Problems, annotations, read_lines
from whalelib.data.photographs import Photographs, as_tensor
from whalelib.data.world.photograph import LANDMARKS as TEN
from whalelib.locate import cache_folder, code_of, looked_at_once, trained_once, weights_hash
from whalelib.metrics import box_iou
from whalelib.models import (
    LITE0_MEAN,
    LITE0_STD,
    SENET154_MEAN,
    SENET154_STD,
    FeatureMap,
    _expect_pixels,
    densenet121,
    second_place_lite,
)
from whalelib.run import EDITIONS, Run, Settings, by_profile
from whalelib.train import evaluating, fit, keep_memory, warm_cosine

LANDMARKS = ("left_tip", "notch", "right_tip", "bottom")
COLUMNS = tuple(f"{name}_{axis}" for name in LANDMARKS for axis in "xy")
MIRRORED = (2, 1, 0, 3)  # which landmark each is in the mirror image
TEN_COLUMNS = tuple(f"{name}_{axis}" for name in TEN for axis in "xy")
TEN_MIRRORED = (4, 3, 2, 1, 0, 9, 8, 7, 6, 5)
NUMBERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 0)  # of the ten in the hand-made file keypoints.csv

SCALES = (0.5, 1.0, 2.0)
RATIOS = ((0.30, 0.30), (0.60, 0.15), (0.15, 0.60))  # width and height, shares of the image
OUTPUTS = 1 + 4 + 2 * len(LANDMARKS)  # of an anchor: score, box, landmarks
POSITIVE, NEGATIVE = 0.75, 0.40  # overlaps above and below which an anchor has the fluke and has none
WIDER, HIGHER = 1.2, 1.1  # the box to find, beside that of the ten points
FOLDS = 5

SIDE = 320  # pixels of the aligned image
REFERENCE_POINTS = np.array([(29.27, 54.37), (158.69, 164.33), (290.02, 59.29), (157.62, 276.19)], np.float32)
AREAS = (0.05, 20.0)  # by how much an alignment may change areas
MARGIN = 1.3  # of the crop's sides to the box's
MARGINS = (1.2, 1.4)  # in training
JITTER = 0.05  # of box and landmarks in training, share of the photograph's side


def _turned_names(names: str, degrees: int) -> dict[str, int]:
    return {f"{name}.jpg": degrees for name in names.split()}


# The competition's photographs that the solution turns, in degrees clockwise.
TURNS: Mapping[str, int] = {
    **_turned_names(
        "3a16eaf31 6089968f6 f3f2023c6 d79731004 74580a97d ac833887c 22ca7df21 7fba36f8c "
        "dde21203c a7dd3f508 5fe0c6963 7cabb0c94 64ad3b4cd 799f86aec ed309eb49 6ee4e7f28",
        90,
    ),
    **_turned_names("2872f5a1a 02bdec750 9d23d989a 91b25cfc6", 180),
    **_turned_names(
        "45d81f7ca 5db3505ac 32cf34278 879a8b7bc 6a4ea1d99 155116572 84a58826e faec9335c e9577799d "
        "5cd62b399 bf84bad36 94bcbacdc 3308f94e2 efae7b997 2f30ae22c cff1c391d 34ff88204 b5cad5e97",
        270,
    ),
}


def _check_edition(edition: str) -> None:
    if edition not in EDITIONS:
        raise ValueError(f"edition = {edition!r}: choose one of {', '.join(EDITIONS)}")


# Anchors. Boxes here are x, y of the centre, width and height, points x, y: shares of the image's sides.


def anchors(grid: int = 9) -> torch.Tensor:
    """Return (M, 4): nine anchors a cell (``SCALES`` times ``RATIOS``) in the middles of grid x grid cells.

    The order is that of the network's output: shapes, then rows, then columns.
    """
    shapes = (torch.tensor(SCALES)[:, None, None] * torch.tensor(RATIOS)).reshape(-1, 1, 1, 2)
    middles = (torch.arange(grid) + 0.5) / grid
    y, x = torch.meshgrid(middles, middles, indexing="ij")
    centres = torch.stack([x, y], -1)[None]
    parts = [part.expand(len(shapes), grid, grid, 2) for part in (centres, shapes)]
    return torch.cat(parts, -1).reshape(-1, 4)


def encode_boxes(boxes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return what an anchor is to say of a box: (x - xa) / wa, (y - ya) / ha, log(w / wa), log(h / ha).

    Boxes and anchors are (..., 4), of shapes that broadcast.
    """
    shift = (boxes[..., :2] - anchors[..., :2]) / anchors[..., 2:]
    return torch.cat([shift, torch.log(boxes[..., 2:] / anchors[..., 2:])], -1)


def decode_boxes(codes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the boxes (..., 4) of :func:`encode_boxes`."""
    centre = anchors[..., :2] + codes[..., :2] * anchors[..., 2:]
    return torch.cat([centre, anchors[..., 2:] * torch.exp(codes[..., 2:])], -1)


def encode_points(points: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return what an anchor is to say of points (..., K, 2): (x - xa) / wa, (y - ya) / ha; anchors are (..., 4)."""
    return (points - anchors[..., None, :2]) / anchors[..., None, 2:]


def decode_points(codes: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
    """Return the points (..., K, 2) of :func:`encode_points`."""
    return anchors[..., None, :2] + codes * anchors[..., None, 2:]


def overlaps(boxes: torch.Tensor, others: torch.Tensor, edition: str = "as_described") -> torch.Tensor:
    """Return the intersection over union of boxes (..., 4) and others, of shapes that broadcast: (...).

    As shipped the area of the first box is its width times the *other's* height, and what is beyond the image counts
    in the areas but not in the intersection: a box that holds an anchor of its own width overlaps it wholly.
    """
    _check_edition(edition)
    shipped = edition == "as_shipped"
    ends = []
    for each in (boxes, others):
        low, high = each[..., :2] - each[..., 2:] / 2, each[..., :2] + each[..., 2:] / 2
        ends.append((low.clamp(0, 1), high.clamp(0, 1)) if shipped else (low, high))
    (low, high), (other_low, other_high) = ends
    common = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(-1)
    other = others[..., 2] * others[..., 3]
    own = boxes[..., 2] * (others if shipped else boxes)[..., 3]
    return common / (own + other - common)


def assigned(
    boxes: torch.Tensor, anchors: torch.Tensor, edition: str = "as_described"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which anchors have the fluke, and which learn to score: (N, M) bool each.

    Above ``POSITIVE`` they have it, below ``NEGATIVE`` they have none, and between nothing is asked of the score. The
    right overlap of a fluke's box with anchors so few seldom reaches ``POSITIVE``, so as described the best anchors of
    an image have its fluke in any case; as shipped an image may be without.

    Args:
        boxes: (N, 4).
        anchors: (M, 4).
        edition: of the overlaps as well, see :func:`overlaps`.
    """
    overlap = overlaps(boxes[:, None], anchors[None], edition)
    positive = overlap > POSITIVE
    if edition == "as_described":
        positive |= overlap >= overlap.amax(1, keepdim=True) - 1e-6
    return positive, positive | (overlap < NEGATIVE)


def landmark_loss(
    output: dict[str, torch.Tensor], batch: dict, edition: str = "as_described"
) -> dict[str, torch.Tensor]:
    """Return 5 (smooth L1 of the box + smooth L1 of the landmarks) + cross-entropy of the score / 2, and each part.

    As shipped, what the anchors between the thresholds say is set to 0, and then all anchors learn box and landmarks
    alike: those that are small and far from the fluke, whose codes are large, outvote the others. The report says
    nothing of the loss. As described, an anchor counts for box and landmarks as much as it overlaps the fluke's box:
    those learn that may be asked, and a neighbour asked by mistake still knows an answer. (The positive ones alone are
    one or two an image.) And half of the score's loss is the positive ones', as there are so few of them.

    Args:
        output: of :class:`LandmarkNetwork`.
        batch: with ``box`` (N, 4) and ``points`` (N, 4, 2).
        edition: "as_described" or "as_shipped".
    """
    anchors = output["anchors"]
    positive, scored = assigned(batch["box"], anchors, edition)
    box = encode_boxes(batch["box"][:, None], anchors)
    points = encode_points(batch["points"][:, None], anchors)
    score = output["score"].float()
    if edition == "as_shipped":
        on = scored[..., None]
        parts = {
            "box": F.smooth_l1_loss(output["box"] * on, box),
            "landmarks": F.smooth_l1_loss(output["points"] * on[..., None], points),
            "score": F.binary_cross_entropy_with_logits(score * scored, positive.float()),
        }
    else:
        weight, none = overlaps(batch["box"][:, None], anchors), scored & ~positive
        error = {
            "box": F.smooth_l1_loss(output["box"], box, reduction="none").mean(2),
            "landmarks": F.smooth_l1_loss(output["points"], points, reduction="none").mean((2, 3)),
        }
        parts = {
            **{name: (each * weight).sum() / weight.sum() for name, each in error.items()},
            "score": (F.softplus(-score[positive]).mean() + F.softplus(score[none]).mean()) / 2,
        }
    return {"loss": 5 * (parts["box"] + parts["landmarks"]) + 0.5 * parts["score"], **parts}


# The network


class LandmarkNetwork(nn.Module):
    """A one-stage detector: from each anchor a score, a box and four landmarks.

    A backbone's map is averaged to grid x grid cells, from which a 1 x 1 convolution reads ``OUTPUTS`` numbers for each
    of a cell's nine anchors.

    Args:
        backbone: a :class:`FeatureMap`; default EfficientNet-Lite0's.
        grid: cells along a side; 9 in the solution.
        mean, std: of the pixels that the backbone expects, a number or one a channel.
        seed: of the new weights.
    """

    def __init__(
        self,
        backbone: FeatureMap | None = None,
        grid: int = 9,
        *,
        mean: float | tuple[float, ...] = LITE0_MEAN,
        std: float | tuple[float, ...] = LITE0_STD,
        seed: int = 0,
    ):
        super().__init__()
        self.backbone = second_place_lite() if backbone is None else backbone
        self.backbone.freeze()
        self.grid = grid
        self.register_buffer("anchors", anchors(grid), persistent=False)
        self.shapes = len(self.anchors) // grid**2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = nn.Conv2d(self.backbone.num_features, OUTPUTS * self.shapes, 1)
        _expect_pixels(self, mean, std)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return codes of M anchors of images (N, 3, H, W), RGB, 0 to 1.

        ``score`` (N, M), a logit; ``box`` (N, M, 4) and ``points`` (N, M, 4, 2), see :func:`decode_boxes` and
        :func:`decode_points`; ``anchors`` (M, 4).
        """
        cells = F.adaptive_avg_pool2d(self.backbone((images - self.mean) / self.std), self.grid)
        codes = self.head(cells).unflatten(1, (OUTPUTS, self.shapes)).flatten(2).transpose(1, 2)
        score, box, points = codes.split((1, 4, OUTPUTS - 5), 2)
        return {
            "score": score[..., 0],
            "box": box,
            "points": points.unflatten(2, (-1, 2)),
            "anchors": self.anchors,
        }


def best_anchors(output: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return boxes (N, 4), landmarks (N, 4, 2) and scores (N,), 0 to 1, of each image's anchor of the highest score."""
    score, best = output["score"].max(1)
    rows = torch.arange(len(best), device=best.device)
    chosen = output["anchors"][best]
    boxes = decode_boxes(output["box"][rows, best], chosen)
    return boxes, decode_points(output["points"][rows, best], chosen), score.sigmoid()


# Photographs


def training_boxes(points: np.ndarray) -> np.ndarray:
    """Return the boxes to find (..., 4): from the least to the greatest of the ten points (..., 10, 2), and wider.

    As shipped 1.2 times as wide and 1.1 times as high about the same centre, at most as the image.
    """
    corners = keypoints.points_box(points)
    box = _centred(corners)
    return np.concatenate([box[..., :2], np.minimum(box[..., 2:] * (WIDER, HIGHER), 1)], -1)


def _centred(corners: np.ndarray) -> np.ndarray:
    low, high = corners[..., :2], corners[..., 2:]
    return np.concatenate([(low + high) / 2, high - low], -1)


def _corners(boxes: np.ndarray) -> np.ndarray:
    centre, sides = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([centre - sides / 2, centre + sides / 2], -1)


def ten_points(catalog: Catalog) -> np.ndarray:
    """Return the ten points (N, 10, 2) of a catalog's photographs, shares of their sides.

    Raises:
        ValueError: a photograph lacks some; the message names it.
    """
    if missing := [column for column in TEN_COLUMNS if column not in catalog.table]:
        raise ValueError(f"the catalog {catalog.name} has no column {missing[0]}: all ten points are needed")
    points = catalog.table[list(TEN_COLUMNS)].to_numpy(dtype=float)
    bare = np.isnan(points).any(axis=1)
    if bare.any():
        image = catalog.table["image"].iat[int(bare.argmax())]
        raise ValueError(f"{image} and {bare.sum() - 1} others of {catalog.name} lack some of the ten points")
    shape = statistics(catalog)[["width", "height"]].to_numpy(dtype=float)
    return points.reshape(-1, len(TEN), 2) / shape[:, None]


class MarkedPhotographs(Photographs):
    """Photographs, squashed to the network's input, with box and landmarks.

    Item i has besides ``box`` (4,), see :func:`training_boxes`, and ``points`` (4, 2), float32, shares of the image's
    sides and within the image.

    Args:
        catalog: what to read; all have the ten points.
        size: (H, W) of the network's input.
        **options: as of ``Photographs``; a transform moves the points too (see :func:`moved`).
    """

    def __init__(self, catalog: Catalog, size: tuple[int, int], **options):
        self.points = ten_points(catalog)
        super().__init__(catalog, size, **options)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor | int]:
        """Return item ``index`` as the class says."""
        index = range(len(self))[index]
        image, points = self.pixels(index), self.points[index]
        if self.transform is not None:
            image, points = moved(self.transform, (self.seed, self.epoch, index), image, points)
        points = np.clip(points, 0, 1)
        four = points[[TEN.index(name) for name in LANDMARKS]]
        item = {"image": as_tensor(image), "label": int(self.labels[index]), "index": index}
        marks = {"box": training_boxes(points), "points": four}
        return {**item, **{name: torch.tensor(value, dtype=torch.float32) for name, value in marks.items()}}


def moved(
    transform: A.Compose, key: tuple[int, ...], image: np.ndarray, points: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return image and ten points (10, 2), shares, after a transform: left on the left when it mirrored."""
    sides = np.array(image.shape[1::-1])
    changed = augment.augmented(transform, key, image=image, keypoints=points * sides)
    points = np.asarray(changed["keypoints"]) / sides
    right = [i for i, name in enumerate(TEN) if name.startswith("right")]
    left = [TEN_MIRRORED[i] for i in right]
    if points[left, 0].sum() > points[right, 0].sum():
        points = points[list(TEN_MIRRORED)]
    return changed["image"], points


# Training


@dataclass(frozen=True)
class Plan:
    """How a profile's networks are made and trained.

    backbone: its name; side: of the square input; grid: cells along a side; images: that each network is shown; batch:
    images a step; rate: of learning; folds: how many of the five networks; milestones: shares of the training after
    which the rate is a tenth, with plain Adam as shipped; none for a warm-up and a cosine.
    """

    backbone: str
    side: int
    grid: int
    images: int
    batch: int
    rate: float
    folds: int
    milestones: tuple[float, ...] = ()


PLANS = by_profile(
    Plan("lite0", 160, 5, 3_500, 8, 3e-3, 1),
    # 3,500 epochs of 665 photographs
    Plan("densenet121", 288, 9, 2_327_500, 16, 5e-4, FOLDS, (1500 / 3500, 2500 / 3500, 3000 / 3500)),
)


def network(plan: Plan, file: Path | str | None = None, seed: int = 0) -> LandmarkNetwork:
    """Return a plan's network, untrained but for its backbone's weights: ``file`` is of a DenseNet's."""
    if plan.backbone.startswith("lite"):
        backbone = second_place_lite(int(plan.backbone.removeprefix("lite")))
        return LandmarkNetwork(backbone, plan.grid, seed=seed)
    backbone = densenet121(file, sha256=weights.known(plan.backbone), seed=seed)
    return LandmarkNetwork(backbone, plan.grid, mean=SENET154_MEAN, std=SENET154_STD, seed=seed)


def fold_numbers(count: int, seed: int = 0) -> np.ndarray:
    """Return which of the ``FOLDS`` each of so many photographs is in (N,): at random, of the same size but for one."""
    return np.random.default_rng(seed).permutation(count) % FOLDS


def train_landmarks(
    catalog: Catalog,
    *,
    fold: int = 0,
    plan: Plan = PLANS["lab"],
    edition: str = "as_described",
    seed: int = 0,
    device: str = "auto",
    folder: Path | None = None,
) -> tuple[LandmarkNetwork, pd.DataFrame]:
    """Train a network on photographs with the ten points, but those of one fold; return it with its history.

    The last row of the history has what the network finds in the photographs left out: ``held-out box IoU``, the mean;
    ``held-out error``, the median distance of a landmark as a share of the width of the box of the ten points.

    The environment's WHALE_DENSENET121 is the path of ImageNet weights; without it a warning says that this network
    starts from random ones.

    Args:
        catalog: photographs of which all have the ten points.
        fold: which of the ``FOLDS`` is left out.
        plan: the network, and how long.
        edition: of the loss, see :func:`landmark_loss`.
        seed: of folds, weights, order and augmentation.
        device: "auto", "cpu" or "cuda".
        folder: for checkpoints; None keeps nothing.

    Raises:
        ValueError: no such fold or edition; a photograph lacks points.
    """
    if fold not in range(FOLDS):
        raise ValueError(f"fold = {fold!r}: choose 0 to {FOLDS - 1}")
    _check_edition(edition)
    lite = plan.backbone.startswith("lite")
    given = None if lite else weights.pretrained(plan.backbone)
    out = fold_numbers(len(catalog), seed) == fold
    size = (plan.side, plan.side)
    photographs = MarkedPhotographs(
        catalog.where(~out), size, transform=keypoints.for_points(size), seed=seed
    )
    epochs = max(1, round(plan.images / len(photographs)))
    model = network(plan, given, seed)
    history = fit(
        model,
        photographs,
        partial(landmark_loss, edition=edition),
        epochs=epochs,
        batch_size=plan.batch,
        optimizer=partial(_optimizer, plan=plan),
        schedule=partial(_rate, plan=plan, epochs=epochs),
        seed=seed,
        device=device,
        folder=folder,
        on_epoch=partial(_held_out, catalog=catalog.where(out), plan=plan, last=epochs),
    )
    return model, history


def _optimizer(model: LandmarkNetwork, plan: Plan) -> torch.optim.Optimizer:
    free = [p for p in model.parameters() if p.requires_grad]
    if plan.milestones:
        return torch.optim.Adam(free, lr=plan.rate, weight_decay=5e-4)
    return torch.optim.AdamW(free, lr=plan.rate, weight_decay=1e-2)


def _rate(position: float, plan: Plan, epochs: int) -> float:
    if plan.milestones:
        return 0.1 ** sum(position / epochs >= share for share in plan.milestones)
    return warm_cosine(position, epochs)


def _held_out(
    model: LandmarkNetwork, row: dict, *, catalog: Catalog, plan: Plan, last: int
) -> dict[str, float]:
    if row["epoch"] < last or not len(catalog):
        return {}
    found = predict_landmarks(model, catalog, plan.side)
    width = np.ptp(ten_points(catalog)[..., 0], axis=1) * _shape(catalog)[:, 1]
    error = np.median(landmark_errors(found, catalog.table) / width[:, None])
    return {"held-out box IoU": float(box_overlaps(found, catalog).mean()), "held-out error": float(error)}


def _shape(catalog: Catalog) -> np.ndarray:
    return statistics(catalog)[["height", "width"]].to_numpy(dtype=float)


def landmark_models(run: Run, folds: int | None = None) -> list[LandmarkNetwork]:
    """Return the profile's networks, trained on the world's training photographs or from the cache.

    They are the same for all data; they depend on the run's profile, edition, seed and device.

    Args:
        run: whose settings to take.
        folds: how many of the five; default the profile's, 1 in the lab and 5 on paper.

    Raises:
        ValueError: fewer than 1 or more than ``FOLDS``.
    """
    return [landmark_model(run, fold) for fold in range(_count(run, folds))]


def histories(run: Run, folds: int | None = None) -> list[pd.DataFrame]:
    """Return how each network of :func:`landmark_models` was trained, see :func:`train_landmarks`."""
    landmark_models(run, folds)
    return [pd.read_csv(_fold_folder(run, fold)[1] / "history.csv") for fold in range(_count(run, folds))]


def _count(run: Run, folds: int | None) -> int:
    folds = PLANS[run.settings.profile].folds if folds is None else folds
    if folds not in range(1, FOLDS + 1):
        raise ValueError(f"folds = {folds!r}: choose 1 to {FOLDS}")
    return folds


def _fold_folder(run: Run, fold: int) -> tuple[Run, Path]:
    """Return a run on the world, and the folder of what a fold's network learns there."""
    settings, plan = run.settings, PLANS[run.settings.profile]
    world = Run(run.notebook, Settings(data=locate.WORLD, seed=settings.seed, device=settings.device))
    # All that decides the weights: a change elsewhere in the library needs no new training.
    parts = [anchors, encode_boxes, encode_points, overlaps, assigned, landmark_loss, LandmarkNetwork]
    parts += [
        densenet121,
        second_place_lite,
        FeatureMap,
        training_boxes,
        ten_points,
        MarkedPhotographs,
        moved,
        network,
        fold_numbers,
        train_landmarks,
    ]
    parts += [_centred, _optimizer, _rate, keypoints.points_box, keypoints.for_points]
    parts += [augment.for_masks, augment.augmented]
    code = code_of(*parts, *map(inspect.getmodule, (Photographs, read_image, fit)))
    given = not plan.backbone.startswith("lite") and weights.content(plan.backbone)
    about = [fold, repr(plan), given, settings.edition, settings.seed, world.device]
    return world, cache_folder("landmark-network", world.catalog.train.fingerprint, code, *about)


def landmark_model(run: Run, fold: int) -> LandmarkNetwork:
    """Return the network of a fold, trained on the world's training photographs or from the cache."""
    world, folder = _fold_folder(run, fold)
    plan, settings = PLANS[run.settings.profile], run.settings
    training = partial(
        train_landmarks,
        fold=fold,
        plan=plan,
        edition=settings.edition,
        seed=settings.seed,
        device=world.device,
        folder=folder,
    )
    return trained_once(
        folder / "network.safetensors",
        lambda: network(plan).to(world.device),
        lambda: training(world.catalog.train),
    )


# From photographs to boxes and landmarks


def predict_landmarks(model: nn.Module, catalog: Catalog, side: int, batch_size: int = 32) -> pd.DataFrame:
    """Find box and landmarks in each photograph: those of its best anchor.

    Args:
        model: from images (N, 3, H, W), RGB, 0 to 1, to codes, as :class:`LandmarkNetwork`.
        catalog: N photographs.
        side: of the square that the model sees.
        batch_size: photographs at a time.

    Returns:
        One row a photograph: ``image``; ``x0``, ``y0``, ``x1``, ``y1`` and the ``COLUMNS``, in its pixels, which may be
        beyond its borders; ``confidence``, the anchor's score.
    """
    photographs = Photographs(catalog, (side, side), memory=False)
    starts = tqdm(range(0, len(photographs), batch_size), "Finding landmarks", leave=False)
    found = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # PIL decodes without Python's lock
        for start in starts:
            chosen = range(start, min(start + batch_size, len(photographs)))
            found.append(_seen(model, np.stack(list(pool.map(photographs.pixels, chosen)))))
    boxes, points, confidence = map(np.concatenate, zip(*found, strict=True))
    table = in_pixels(boxes, points, _shape(catalog)).assign(confidence=confidence)
    table.insert(0, "image", catalog.table["image"].to_numpy())
    return table


@torch.inference_mode()
def _seen(model: nn.Module, images: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return what :func:`best_anchors` says of images (N, H, W, 3) uint8 RGB; the model is left as it was."""
    keep_memory()
    with evaluating(model) as device:
        output = model(torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 255)
    return tuple(part.double().cpu().numpy() for part in best_anchors(output))


def in_pixels(boxes: np.ndarray, points: np.ndarray, shape: np.ndarray) -> pd.DataFrame:
    """Return a table with ``x0``, ``y0``, ``x1``, ``y1`` and the ``COLUMNS`` in pixels.

    Args:
        boxes: (N, 4) x, y of the centre, width and height, shares of the photographs' sides.
        points: (N, 4, 2) shares.
        shape: (N, 2) heights and widths.
    """
    sides = shape[:, None, ::-1]
    values = np.concatenate([_corners(boxes).reshape(-1, 2, 2), points], 1) * sides
    return pd.DataFrame(values.reshape(-1, len(BOX) + len(COLUMNS)), columns=[*BOX, *COLUMNS])


def shares(table: pd.DataFrame, shape: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (N, 4) and points (N, 4, 2) of a table as :func:`in_pixels` makes it."""
    values = table[[*BOX, *COLUMNS]].to_numpy(dtype=float).reshape(-1, 2 + len(LANDMARKS), 2)
    values = values / shape[:, None, ::-1]
    return _centred(values[:, :2].reshape(-1, 4)), values[:, 2:]


def ensemble(
    boxes: np.ndarray, points: np.ndarray, edition: str = "as_described"
) -> tuple[np.ndarray, np.ndarray]:
    """Return what the networks of F folds find together: the mean of the two whose boxes overlap most.

    As shipped "the two" may be one and the same, which overlaps itself wholly: of five folds the fourth is taken alone,
    but where it agrees wholly with the fifth. The box is made 1.3 times as wide and high (the crop does so again), and
    its centre is half its width and height, so that it begins in the photograph's upper left corner.

    Args:
        boxes: (F, N, 4) x, y of the centre, width and height, shares of the photographs' sides.
        points: (F, N, 4, 2) shares.
        edition: "as_described" or "as_shipped".

    Returns:
        Boxes (N, 4) and points (N, 4, 2), cut at the photographs' borders.
    """
    _check_edition(edition)
    shipped, folds = edition == "as_shipped", len(boxes)
    boxes, points = np.asarray(boxes, dtype=float), np.asarray(points, dtype=float).clip(0, 1)
    if shipped:
        boxes = np.concatenate([boxes[..., :2], (boxes[..., 2:] * MARGIN).clip(0, 1)], -1)
    corners = _corners(boxes).clip(0, 1)
    pairs = list(combinations(range(folds), 2)) or [(0, 0)]
    if shipped:
        # The last fold isn't compared with itself; of equals the last pair is taken.
        pairs = [
            pair for pair in combinations_with_replacement(range(folds), 2) if pair[0] < max(folds - 1, 1)
        ]
        pairs.reverse()
    one, other = np.array(pairs).T
    best = _agreement(corners[one], corners[other]).argmax(0)
    rows = np.arange(boxes.shape[1])
    mean = (corners[one[best], rows] + corners[other[best], rows]) / 2
    box = _centred(mean)
    if shipped:
        box[:, :2] = box[:, 2:] / 2
    return box, (points[one[best], rows] + points[other[best], rows]) / 2


def _agreement(corners: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the IoU of boxes (..., 4), x0, y0, x1, y1; -1 where one is empty."""
    sound = ((corners[..., :2] < corners[..., 2:]) & (others[..., :2] < others[..., 2:])).all(-1)
    overlap = np.full(sound.shape, -1.0)
    overlap[sound] = box_iou(corners[sound], others[sound])
    return overlap


def found_landmarks(run: Run, catalog: Catalog, folds: int | None = None) -> list[pd.DataFrame]:
    """Return what each of the run's networks finds (:func:`predict_landmarks`), each photograph looked at once."""
    side = PLANS[run.settings.profile].side
    parts = [anchors, decode_boxes, decode_points, best_anchors]
    parts += [predict_landmarks, _seen, in_pixels, _corners]
    code = code_of(*parts, *map(inspect.getmodule, (Photographs, read_image)))
    tables = []
    for model in landmark_models(run, folds):
        folder = cache_folder("landmarks", weights_hash(model), code, side, run.device)
        find = partial(predict_landmarks, model, side=side)
        tables.append(looked_at_once(folder / "landmarks.csv", catalog, find))
    return tables


def located(
    run: Run,
    *,
    landmarks: Path | str | None = None,
    boxes: Path | str | None = None,
    folds: int | None = None,
    fold: int | None = None,
) -> Catalog:
    """Return the run's photographs with a box and four landmarks each, supplied or found by networks.

    What is supplied takes precedence, row by row: first the arguments, then what lies beside the photographs. The truth
    of a generated world is not supplied: it is for training and measuring. What is found is the networks' ensemble, as
    the run's edition has it.

    Args:
        run: whose catalog, profile, edition, seed and device to take.
        landmarks: a CSV file, in pixels: Image (or filename) and the ``COLUMNS``, and perhaps x0, y0, x1, y1; or the
            ten points as left_tip_x, ..., or as 1_x, 1_y to 9_y, 0_x, 0_y, from which comes a box too
            (:func:`training_boxes`).
        boxes: a CSV file Image, x0, y0, x1, y1, in pixels.
        folds: how many networks, see :func:`landmark_models`.
        fold: one of them, from 0, to take alone, instead of the ensemble.

    Returns:
        The catalog with ``x0``, ``y0``, ``x1``, ``y1``, within the photograph; the ``COLUMNS``; ``box_from``
        ("supplied", "network", or "whole" for the whole photograph, where the box found is beyond it);
        ``landmarks_from`` ("supplied", "network"); and ``confidence``, the folds' mean, where anything was found. Rows
        that make no sense are printed and added to ``problems``; what they would have supplied is found instead.

    Raises:
        CatalogError: a file can't be used at all; the message names file and row.
    """
    catalog = run.catalog
    problems = Problems()
    table, places = locate.supplied(catalog, boxes, None, problems)
    table = table.drop(columns="rle")
    if (catalog.root / "world.json").is_file():
        table = table.drop(columns=list(COLUMNS), errors="ignore")
    for column in COLUMNS:
        table[column] = table.get(column, np.nan)
    shape = _shape(catalog)
    rows = {}
    if landmarks is not None:
        notes, rows = _read_landmarks(Path(landmarks), catalog, problems)
        locate._join(table, notes[list(COLUMNS)], Path(landmarks).name, problems)
        with_box = notes[list(BOX)].dropna()
        with_box = with_box[with_box.index.isin(table["image"]) & ~with_box.index.isin(places)]
        locate._join(table, with_box, Path(landmarks).name, problems)
        places = rows | places
    locate.check_boxes(table, shape, places, problems)
    _check_landmarks(table, shape, rows, problems)

    no_box, no_points = table["x0"].isna().to_numpy(), table[COLUMNS[0]].isna().to_numpy()
    table["box_from"] = np.where(no_box, "network", "supplied")
    table["landmarks_from"] = np.where(no_points, "network", "supplied")
    table["confidence"] = np.nan
    if (bare := no_box | no_points).any():
        tables = found_landmarks(run, catalog.where(bare), folds)
        table.loc[bare, "confidence"] = np.mean([each["confidence"] for each in tables], axis=0)
        edition = run.settings.edition
        if fold is not None:
            tables, edition = [tables[fold]], "as_described"  # the shipped slip is the ensemble's
        folds_say = map(np.stack, zip(*(shares(each, shape[bare]) for each in tables), strict=True))
        found = in_pixels(*ensemble(*folds_say, edition), shape[bare])
        table.loc[no_box, list(BOX)] = found.loc[no_box[bare], list(BOX)].to_numpy()
        table.loc[no_points, list(COLUMNS)] = found.loc[no_points[bare], list(COLUMNS)].to_numpy()
    whole = np.tile(shape[:, ::-1], 2) * [0, 0, 1, 1]
    cut = table[list(BOX)].to_numpy().clip(0, np.tile(shape[:, ::-1], 2))
    empty = (cut[:, :2] >= cut[:, 2:]).any(axis=1)
    table[list(BOX)] = np.where(empty[:, None], whole, cut)
    table.loc[empty, "box_from"] = "whole"
    return locate.with_boxes(catalog, table, problems)


def _read_landmarks(
    path: Path, catalog: Catalog, problems: Problems
) -> tuple[pd.DataFrame, dict[str, tuple[str, int]]]:
    """Return what a file says of boxes and landmarks, one row a name, and the file and row of each name."""
    header = next((line.fields for line in read_lines(path, (), Problems())), {})
    numbered = dict(
        zip([f"{number}_{axis}" for number in NUMBERS for axis in "xy"], TEN_COLUMNS, strict=True)
    )
    key = "filename" if "filename" in header else "Image"
    lines = read_lines(path, (key, *(numbered if "1_x" in header else COLUMNS)), problems)
    if not problems.refused:
        notes = annotations(path.name, key, lines, Folder(path.parent), problems).rename(columns=numbered)
    if problems.refused:
        raise refusal("supplied landmarks are refused", problems)
    notes = notes.reindex(columns=list(dict.fromkeys([*BOX, *COLUMNS, *TEN_COLUMNS])))
    rows = {line.fields[key]: (path.name, line.row) for line in reversed(lines)}
    _box_of_ten(notes, catalog)
    return notes, rows


def _box_of_ten(notes: pd.DataFrame, catalog: Catalog) -> None:
    """Put a box beside ten whole points that have none."""
    shape = pd.DataFrame(_shape(catalog), index=catalog.table["image"])
    whole = notes[list(TEN_COLUMNS)].notna().all(axis=1) & notes["x0"].isna()
    chosen = notes.index[whole].intersection(shape.index)
    points = notes.loc[chosen, list(TEN_COLUMNS)].to_numpy(dtype=float).reshape(-1, len(TEN), 2)
    sides = shape.loc[chosen].to_numpy()[:, ::-1]
    box = training_boxes((points / sides[:, None]).clip(0, 1))
    notes.loc[chosen, list(BOX)] = _corners(box) * np.tile(sides, 2)


def _check_landmarks(table: pd.DataFrame, shape: np.ndarray, places: dict, problems: Problems) -> None:
    """Leave out landmarks of which one is missing, or which all lie beyond their photograph on one side."""
    points = table[list(COLUMNS)].to_numpy(dtype=float).reshape(-1, len(LANDMARKS), 2)
    missing = np.isnan(points).any(axis=2)
    beyond = ((points < 0).all(axis=1) | (points >= shape[:, None, ::-1]).all(axis=1)).any(axis=1)
    for i in np.flatnonzero(missing.any(axis=1) & ~missing.all(axis=1) | beyond):
        name = table["image"].iat[i]
        what = f"its landmarks are beyond its {shape[i, 1]:g} x {shape[i, 0]:g} pixels"
        if missing[i].any():
            what = f"its {', '.join(np.array(LANDMARKS)[missing[i]])} is missing"
        problems.skip(*places.get(name, ("the catalog", None)), f"{name}: {what}; its landmarks are left out")
    table.loc[missing.any(axis=1) | beyond, list(COLUMNS)] = np.nan


# Crops. Of one photograph or of many: leading dimensions are free.


def crop_of(
    boxes: np.ndarray, points: np.ndarray, generator: np.random.Generator | None = None
) -> np.ndarray:
    """Return crops (..., 4), x0, y0, x1, y1, shares of the photograph's sides and within it.

    A crop holds the box, made ``MARGIN`` times as wide and high, and all landmarks. In training the box is moved by up
    to ``JITTER`` of the photograph's sides, and each side grows by a factor of its own within ``MARGINS``.

    Args:
        boxes: (..., 4) x, y of the centre, width and height, shares of the photograph's sides.
        points: (..., K, 2) landmarks, shares.
        generator: of the training's draws; None for validation and test.
    """
    boxes, points = np.asarray(boxes, dtype=float), np.asarray(points, dtype=float)
    centre, sides = boxes[..., :2], boxes[..., 2:]
    if generator is None:
        sides = sides * MARGIN
    else:
        centre = centre + generator.uniform(-JITTER, JITTER, centre.shape)
        sides = sides * generator.uniform(*MARGINS, sides.shape)
    low = np.minimum(centre - sides / 2, points.min(axis=-2))
    high = np.maximum(centre + sides / 2, points.max(axis=-2))
    return np.concatenate([low, high], -1).clip(0, 1)


def crop_pixels(crops: np.ndarray, shape: np.ndarray) -> np.ndarray:
    """Return crops (..., 4) in whole pixels, rounded down as shipped, but a pixel wide and high at least.

    Args:
        crops: as of :func:`crop_of`.
        shape: (..., 2) heights and widths of the photographs.
    """
    sides = np.asarray(shape, dtype=float)[..., ::-1]
    low, high = np.floor(crops[..., :2] * sides), np.floor(crops[..., 2:] * sides)
    low = np.minimum(low, sides - 1)
    return np.concatenate([low, np.maximum(high, low + 1)], -1)


def jittered(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return landmarks (..., K, 2), shares, each coordinate moved by up to ``JITTER``: in training, after the crop."""
    return points + generator.uniform(-JITTER, JITTER, np.shape(points))


def within(points: np.ndarray, crops: np.ndarray) -> np.ndarray:
    """Return landmarks (..., K, 2) as shares of crops (..., 4), cut at their borders."""
    low, high = crops[..., None, :2], crops[..., None, 2:]
    return ((points - low) / np.maximum(high - low, 1e-9)).clip(0, 1)


def turned(
    image: np.ndarray, box: np.ndarray, points: np.ndarray, degrees: int, edition: str = "as_described"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a photograph, its box and its landmarks, turned upright (section 5.2.1, Figure 5.2).

    Which photographs need it, and by how much, a mapping such as ``TURNS`` says: ``TURNS.get(name, 0)``. The report
    turns "during training"; the shipped code in validation and test only.

    Args:
        image: (H, W, 3) uint8 RGB.
        box: (4,) x, y of the centre, width and height, shares of the image's sides.
        points: (K, 2) shares.
        degrees: 0, 90, 180 or 270, clockwise.
        edition: "as_described" turns the whole photograph, (H, W) to (W, H). "as_shipped" keeps the picture's size, so
            that of an oblong photograph two ends are lost and the rest is black; box and landmarks may then be beyond.

    Raises:
        ValueError: another angle or edition.
    """
    _check_edition(edition)
    if degrees not in (0, 90, 180, 270):
        raise ValueError(f"degrees = {degrees!r}: choose 0, 90, 180 or 270")
    height, width = image.shape[:2]
    box, points = np.asarray(box, dtype=float), np.asarray(points, dtype=float)
    quarters = degrees // 90
    sides = np.array([width, height], dtype=float)
    after = sides if edition == "as_shipped" else np.roll(sides, quarters)
    if edition == "as_shipped":
        turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1)
        image = cv2.warpAffine(image, turn, (width, height)) if quarters else image
    else:
        image = np.ascontiguousarray(np.rot90(image, -quarters))
    rotation = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), quarters)

    def moved_points(shares: np.ndarray) -> np.ndarray:
        return (shares - 0.5) * sides @ rotation.T / after + 0.5

    lengths = np.roll(box[2:] * sides, quarters) / after
    return image, np.concatenate([moved_points(box[:2]), lengths]), moved_points(points)


# Alignment


def align_matrix(
    landmarks: np.ndarray, reference: np.ndarray = REFERENCE_POINTS, size: float = SIDE
) -> np.ndarray:
    """Return the affine maps (..., 2, 3) that bring landmarks nearest to the reference points, by least squares.

    Landmarks on one line leave the map open: of those that fit best the one of the smallest numbers is taken, and from
    landmarks in one place it maps all to a line. Landmarks *nearly* on a line may give a map that stretches beyond
    measure. No case raises an error; see :func:`aligned`.

    Args:
        landmarks: (..., 4, 2) x, y in pixels.
        reference: (4, 2) where they are to be in an image of ``SIDE`` x ``SIDE``.
        size: the side of the image to be aligned to; the reference is scaled to it.
    """
    landmarks = np.asarray(landmarks, dtype=float)
    ones = np.ones((*landmarks.shape[:-1], 1))
    target = np.asarray(reference, dtype=float) * (size / SIDE)
    solved = np.linalg.pinv(np.concatenate([landmarks, ones], -1), rcond=4 * np.finfo(float).eps) @ target
    return np.swapaxes(solved, -1, -2)


def aligned(image: np.ndarray, landmarks: np.ndarray, size: int = SIDE) -> np.ndarray:
    """Return the image with its landmarks near the reference points, zeros where nothing was (Figure 5.1b).

    A map that mirrors, or that makes areas less than ``AREAS[0]`` or more than ``AREAS[1]`` times as large, as from
    landmarks nearly on one line, shows no fluke any more: the image is then resized only. The shipped code warps it all
    the same.

    Args:
        image: (H, W, 3) uint8 RGB, usually (size, size).
        landmarks: (4, 2) x, y in pixels of the image.
        size: of the square that is returned.
    """
    matrix = align_matrix(landmarks, size=size)
    change = np.linalg.det(matrix[:, :2]) * image.shape[0] * image.shape[1] / size**2
    if not AREAS[0] <= change <= AREAS[1]:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_LINEAR)
    return cv2.warpAffine(image, matrix, (size, size))


# How good they are


def landmark_errors(found: pd.DataFrame, truth: pd.DataFrame) -> np.ndarray:
    """Return (N, 4): how far each landmark found is from the true one, in pixels; tables with the ``COLUMNS``.

    Their share within a part of the box's diagonal (PCK) is :func:`whalelib.keypoints.correct_points`.
    """
    tables = (table[list(COLUMNS)].set_axis(keypoints.COLUMNS, axis=1) for table in (found, truth))
    return keypoints.point_errors(*tables)


def box_overlaps(found: pd.DataFrame, catalog: Catalog) -> np.ndarray:
    """Return (N,): the IoU of boxes found with the boxes that the networks learn, of a catalog with the ten points."""
    own, _ = shares(found, _shape(catalog))
    truth = training_boxes(ten_points(catalog).clip(0, 1))
    return overlaps(torch.tensor(own), torch.tensor(truth)).numpy()
