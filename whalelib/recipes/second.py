"""The second place solution of Shen (chapter 4 of the report), from photographs to five guesses.

Boxes from four key points, the augmentations of Table 4.1, every photograph a second time mirrored as a whale of its
own, one flow over any backbone, batches of whales by fours, a focal, a margin and a triplet loss, a learning rate that
warms up and falls, and ten networks that vote with their five most probable whales.

Editions. Where the report says nothing, both do what the solution's code does. Where report and code contradict each
other, `as_described` follows the report, its slips mended, and `as_shipped` the code.
"""

import argparse
import inspect
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import torch

from whalelib import augment, keypoints, weights
from whalelib.contest import Contest
from whalelib.data.batches import Doubled, Portions, PxK, Shuffled, doubled
from whalelib.files import locked, replacing
from whalelib.identify import choose_threshold, hold_out, pseudo_labels, top5, top_probabilities
from whalelib.ledger import append_ledger, ledger_path, rows_of
from whalelib.losses import arcface, euclidean, focal, triplet
from whalelib.metrics import map_at_k
from whalelib.models import (
    SECOND_PLACE_BACKBONES,
    SENET154_MEAN,
    SENET154_STD,
    SecondPlace,
    second_place_backbone,
    second_place_lite,
)
from whalelib.recipes import baseline, first
from whalelib.recipes.baseline import Answer
from whalelib.recipes.first import BY, Parts
from whalelib.run import Run, Settings, add_run_arguments, by_profile
from whalelib.train import fit, load_best

SIZES = by_profile(((96, 192), (96, 96)), ((256, 512), (512, 512)))  # (H, W); the first is the default
BACKBONES = by_profile(("lite0", "lite1", "lite2"), SECOND_PLACE_BACKBONES)
BATCH = by_profile(32, 64)
GROUP = by_profile(2, 4)  # images of a whale in a batch; as shipped always 4, its triplets need them
RATE = by_profile(1e-3, 3e-4)  # the highest
NEW_RATE = by_profile(10, 1)  # times that, for what starts from nothing
MARGIN = {
    "as_described": 0.5,
    "as_shipped": 0.0,
}  # radians; the shipped code never applies its margin in training
EPOCHS = by_profile(20, 100)
NEW = 0.185  # what every file says of new_whale in the shipped ensemble
PSEUDO_SHARE = 1505 / 7960  # of the test photographs got a pseudo label (section 4.2)

# Section 4.3.5, Figure 4.9: until which epoch, learning rate, share of the classes in the losses of the hardest. The
# share is the code's.
SCHEDULE = (
    (4, 1e-4, 1e-2),
    (9, 2e-4, 1e-2),
    (39, 3e-4, 7e-3),
    (49, 1e-4, 6e-3),
    (59, 5e-5, 5e-3),
    (100, 1e-5, 4e-3),
)

# Table 4.2: backbone and size, as places in BACKBONES and SIZES, with pseudo labels or without, weight.
MODELS = {
    **{"a": (0, 0, False, 1), "b": (0, 0, True, 2), "c": (0, 1, False, 1), "d": (0, 1, True, 2)},
    **{"e": (1, 0, False, 1), "f": (1, 0, True, 2), "g": (1, 1, False, 1), "h": (1, 1, True, 2)},
    **{"i": (2, 0, False, 1), "j": (2, 1, True, 2)},
}

# What an ablation may leave out.
PARTS = ("boxes", "Table 4.1", "mirrored whales", "batches of groups", "focal", "margin", "triplet")


@dataclass(frozen=True)
class Choices:
    """What a network may be trained with besides the profile's and the edition's.

    backbone: one of the profile's BACKBONES; size: (H, W); pseudo: with pseudo-labelled test photographs; margin: of
    the margin loss, default .5 as described and 0 as shipped, where the margin was never applied; batch: images;
    group: images of a whale in it; images: share of the budget; without: some of PARTS.

    Raises:
        ValueError: no such part.
    """

    backbone: str | None = None
    size: tuple[int, int] | None = None
    pseudo: bool = False
    margin: float | None = None
    batch: int | None = None
    group: int | None = None
    images: float = 1.0
    without: tuple[str, ...] = ()

    def __post_init__(self):
        first.check_choices(self, PARTS)


def choices_of(profile: str, model: str, images: float = 1.0) -> Choices:
    """Return the choices of one of Table 4.2's models, `a` to `j`."""
    backbone, size, pseudo, _ = MODELS[model]
    return Choices(BACKBONES[profile][backbone], SIZES[profile][size], pseudo, images=images)


def schedule(epoch: float) -> tuple[float, float]:
    """Return learning rate and share of the hardest at an epoch of the 100, from 0; 2.5 is in the third."""
    return next(((rate, hardest) for until, rate, hardest in SCHEDULE if epoch < until), SCHEDULE[-1][1:])


def rate_factor(position: float, epochs: int) -> float:
    """Return the learning rate's factor at a position in so many epochs that stand for the 100."""
    return schedule(position / epochs * EPOCHS["paper"])[0] / max(rate for _, rate, _ in SCHEDULE)


class Loss:
    """The solution's loss: focal + 0.1 margin + triplet, each as scalar of its own too (section 4.3.3).

    As described the focal loss is a mean over all classes; as shipped over the hardest of each row, whose share
    falls with the epochs. As shipped the triplets are mined from scrambled rows. In both ``new_whale`` is a class of
    the triplets, a row without any for the focal loss, and no row of the margin loss.

    Args:
        edition: see above.
        epochs: that stand for the 100.
        margin: of the margin loss.
        without: which of the three to leave out of the sum.
    """

    WEIGHTS: ClassVar = {"focal": 1.0, "margin": 0.1, "triplet": 1.0}

    def __init__(self, edition: str, epochs: int, margin: float, without: Sequence[str] = ()):
        self.shipped, self.epochs, self.margin = edition == "as_shipped", epochs, margin
        self.weights = {name: weight for name, weight in self.WEIGHTS.items() if name not in without}
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, from 0 up, and with it the share of the hardest."""
        self.hardest = schedule((epoch + 0.5) / self.epochs * EPOCHS["paper"])[1] if self.shipped else None

    def __call__(self, output: dict, batch: dict) -> dict[str, torch.Tensor]:
        """Return the losses and MAP@5 on the batch."""
        labels, logits = batch["label"], output["logits"]
        parts = {
            "focal": focal(logits, labels, self.hardest),
            "margin": arcface(output["cosines"], labels, self.margin),
            "triplet": triplet(euclidean(output["features"]), labels, as_shipped=self.shipped),
        }
        total = sum(weight * parts[name] for name, weight in self.weights.items())
        return {"loss": total, **parts, "MAP@5": first.batch_map(logits.detach(), labels)}


def optimizer(model: SecondPlace, rate: float = RATE["paper"], new: float = 1) -> torch.optim.Optimizer:
    """Return Adam with betas (.9, .999) and weight decay 2e-4 in the gradient, over what is not frozen.

    rate: of the backbone; new: times that, for neck and heads, which start from nothing.
    """
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fresh = [p for name, p in learned.items() if not name.startswith("backbone.")]
    groups = [{"params": [p for name, p in learned.items() if name.startswith("backbone.")]}]
    groups += [{"params": fresh, "lr": rate * new}]
    return torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.999), weight_decay=2e-4)


def network(
    profile: str, identities: int, edition: str, seed: int, backbone: str | None = None
) -> SecondPlace:
    """Return the network over one of the profile's BACKBONES; default the first.

    ImageNet weights are those that :func:`whalelib.weights.found` finds; without them a warning says where to get them,
    and the network starts from random ones.

    Raises:
        ValueError: the profile has no such backbone.
    """
    name = backbone or BACKBONES[profile][0]
    if name not in BACKBONES[profile]:
        raise ValueError(f"backbone = {name!r}: choose one of {', '.join(BACKBONES[profile])}")
    if profile != "paper":
        body = second_place_lite(int(name.removeprefix("lite")))
        return SecondPlace(identities, body, edition=edition, seed=seed)
    body = second_place_backbone(name, weights.pretrained(name), sha256=weights.known(name), seed=seed)
    pixels = {"mean": SENET154_MEAN, "std": SENET154_STD}
    return SecondPlace(identities, body, edition=edition, seed=seed, **pixels)


def parts(run: Run, size: tuple[int, int] | None = None, crop: str | None = "box") -> Parts:
    """Find the flukes' key points and boxes in the run's data, and part the photographs as the first recipe does."""
    located = keypoints.located(run)
    rest, held = hold_out(located.train, new=0.25, seed=run.settings.seed)
    size = size or SIZES[run.settings.profile][0]
    return Parts(rest, held, located.test, size, run.settings.seed, masks=False, crop=crop)


def budget(profile: str, parts: Parts, batch: int | None = None, group: int | None = None) -> int:
    """Return how many images a network may see: the baseline's, or under `paper` those of EPOCHS passes.

    batch, group: images in a batch, and of a whale in it, which decide how many a pass has; default the profile's.
    """
    if profile != "paper":
        return baseline.budget(profile, parts.rest)
    batch, group = batch or BATCH[profile], group or GROUP[profile]
    labels = doubled(parts.rest.table["identity"], parts.known)
    return (
        EPOCHS[profile] * batch * len(PxK(labels, batch, 2 * len(parts.known), images=group, seed=parts.seed))
    )


def with_pseudo_labels(run: Run, here: Parts, choices: Choices) -> Parts:
    """Add the queries of which the network without pseudo labels is surest, as many as the report's share of them."""
    plain = trained(run, replace(choices, pseudo=False, backbone=None, size=None))
    found = first.probabilities(plain.model, plain.parts.photographs(here.queries))
    sure = np.quantile(found.max(1), 1 - PSEUDO_SHARE)
    labels = pseudo_labels(found, here.known, here.queries.table["image"], float(sure)).set_index("image")
    extra = here.queries.where(here.queries.table["image"].isin(labels.index).to_numpy())
    table = extra.table.assign(
        identity=labels.loc[extra.table["image"], "identity"].to_numpy(), split="train"
    )
    whole = pd.concat([here.rest.table, table], ignore_index=True)
    return replace(here, rest=replace(here.rest, table=whole))


def trained(run: Run, choices: Choices | None = None) -> first.Trained:
    """Train a network, or fetch it from the cache, or go on where a killed run stopped.

    It sees as many images as the baseline of notebook 01_02 does of the same data, in twenty epochs, and the last
    weights are taken. Under `paper` it goes through the data a hundred times instead, and keeps the epoch that is best
    on the held-out photographs.
    """
    choices, settings = choices or Choices(), run.settings
    profile, edition = settings.profile, settings.edition
    here = parts(run, choices.size, None if "boxes" in choices.without else "box")
    margin = MARGIN[edition] if choices.margin is None else choices.margin
    backbone = choices.backbone or BACKBONES[profile][0]
    group = GROUP["paper" if edition == "as_shipped" else profile]
    chosen = {"batch": choices.batch or BATCH[profile], "group": choices.group or group}
    choices = replace(choices, backbone=backbone, margin=margin, **chosen)
    images = budget(profile, here, choices.batch, choices.group) * choices.images
    if choices.pseudo:
        here = with_pseudo_labels(run, here, choices)
    data = [part.fingerprint for part in (here.rest, here.held)]
    given = profile == "paper" and weights.content(backbone)
    key = {**asdict(choices), "size": here.size, "weights": given, "photographs": data, "budget": images}
    modules = map(inspect.getmodule, (Doubled, first.trained, trained))
    folder = run.folder("second", code=baseline.training_code(*modules), **key)
    model = network(profile, len(here.known), edition, settings.seed, backbone).to(run.device)
    history = first.trained_or_kept(model, folder, lambda: _train(run, choices, model, here, folder, images))
    return first.Trained(model, here, history)


def _train(
    run: Run, choices: Choices, model: SecondPlace, here: Parts, folder: Path, images: float
) -> pd.DataFrame:
    profile, edition, seed = run.settings.profile, run.settings.edition, run.settings.seed
    pixels = baseline.pixels_folder()
    plain = "Table 4.1" in choices.without
    transform = augment.baseline(here.size) if plain else augment.second_place(here.size, edition)
    twice = "mirrored whales" not in choices.without
    data = Doubled(here.photographs(here.rest, transform, folder=pixels), twice)
    held = here.photographs(here.held, folder=pixels)
    if "batches of groups" in choices.without:
        sampler = Shuffled(len(data), choices.batch, seed)
    else:
        sampler = PxK(data.labels, choices.batch, data.new, images=choices.group, seed=seed)
    epochs = EPOCHS[profile]
    portion = max(1, round(images / choices.batch / epochs))
    best = "valid MAP@5" if profile == "paper" else None
    history = fit(
        model,
        data,
        Loss(edition, epochs, choices.margin, choices.without),
        epochs=epochs,
        folder=folder,
        batch_size=choices.batch,
        optimizer=partial(optimizer, rate=RATE[profile], new=NEW_RATE[profile]),
        schedule=partial(rate_factor, epochs=epochs),
        sampler=Portions(sampler, portion),
        seed=seed,
        **run.resources,
        on_epoch=partial(_validate, held=held, epochs=None if best else epochs),
        best=best,
        settings={"choices": asdict(choices), "portion": portion},
    )
    if best:
        load_best(model, optimizer(model), folder)
    return history.assign(images=history["steps"] * choices.batch)


def _validate(model: SecondPlace, row: dict, *, held, epochs: int | None) -> dict:
    """Return the scores on held-out photographs: after each epoch, or the last."""
    if epochs and row["epoch"] < epochs:
        return {}
    return first.validation(model, held)


TOP = 5


def top_only(probability: np.ndarray) -> np.ndarray:
    """Return probabilities (..., C) with zeros for all but the five highest, as the solution's files keep them."""
    if probability.shape[-1] <= TOP:
        return probability
    least = np.partition(probability, -TOP, axis=-1)[..., -TOP, None]
    return np.where(probability >= least, probability, 0)


def votes(networks: Sequence[first.Trained], part: str, weights: Sequence[float] | None = None) -> np.ndarray:
    """Return (Q, C): each whale's mean probability over the networks' views, what a view does not keep being 0.

    The same as `identify.blend` of the views' files, divided by the sum of the weights (section 4.4).

    Args:
        networks: of one run.
        part: "held" or "queries": whose photographs, Q of them.
        weights: of the networks; default alike.
    """
    views = [
        top_only(first.both_probabilities(one.model, one.parts.photographs(getattr(one.parts, part)))).mean(0)
        for one in networks
    ]
    return np.average(views, axis=0, weights=weights)


def answer(
    networks: first.Trained | Sequence[first.Trained],
    by: str = "classes",
    weights: Sequence[float] | None = None,
) -> Answer:
    """Name the queries' whales, with one network or several that vote.

    By "classes", as the solution: the five most probable whales of photograph and of mirror image. As shipped
    ``new_whale`` has .185 everywhere; as described, since the report is silent, what is best on the held-out
    photographs. By "neighbours", ours, as in the first recipe.
    """
    if by not in BY:
        raise ValueError(f"by = {by!r}: choose one of {', '.join(BY)}")
    networks = [networks] if isinstance(networks, first.Trained) else list(networks)
    here, known = networks[0].parts, networks[0].parts.known
    if by == "neighbours":
        return first.by_neighbours(networks)
    truth = here.held.table["identity"].to_numpy(dtype=object)
    held, found = (votes(networks, part, weights) for part in ("held", "queries"))
    shipped = networks[0].model.edition == "as_shipped"
    new = NEW if shipped else choose_threshold(held, known, truth)
    score = map_at_k(top5(held, known, new), truth)
    return Answer(top5(found, known, new), float(new), float(score), found, np.array(known, dtype=object))


def kept_files() -> Path:
    """Return where what the ten networks said is kept, beside the ledger: what `files` returns, and whose it is."""
    return ledger_path().parent / "second_place_files.csv.gz"


def files(network: first.Trained) -> pd.DataFrame:
    """Return a network's files as the solution keeps them: five whales of each photograph and mirror image.

    Columns: part ("held" or "queries"), view ("plain" or "mirrored"), and those of `identify.top_probabilities`.
    """
    here, found = network.parts, []
    for part in ("held", "queries"):
        catalog = getattr(here, part)
        if not len(catalog):
            continue
        views = first.both_probabilities(network.model, here.photographs(catalog))
        for view, probability in zip(("plain", "mirrored"), views, strict=True):
            rows = top_probabilities(probability, here.known, catalog.table["image"], TOP)
            found.append(rows.assign(part=part, view=view))
    return pd.concat(found, ignore_index=True)


def main(arguments: list[str] | None = None) -> int:
    """Train some of Table 4.2's ten networks; keep their files, and their scores in the ledger."""
    parser = argparse.ArgumentParser(prog="python -m whalelib.recipes.second", description=main.__doc__)
    add_run_arguments(parser)
    parser.add_argument("--models", default="".join(MODELS), help="their letters (default: all)")
    chosen = parser.parse_args(arguments)
    run = Run("04_16", Settings(data=chosen.data, edition=chosen.edition, seed=chosen.seed))
    contest = Contest.open(run.catalog)
    whose = {"data": run.settings.public_data, "edition": chosen.edition, "seed": chosen.seed}
    for name in chosen.models:
        started = time.monotonic()
        network = trained(run, choices_of("lab", name))
        images = network.parts.queries.table["image"]
        scores = {}
        for by in BY:
            score = contest.score_guesses(images, answer(network, by).guesses).all
            scores[f"MAP@5, model {name}, by {by}"] = round(score, 4)
        command, seconds = "python -m whalelib.recipes.second", time.monotonic() - started
        append_ledger(rows_of(run, scores, command=command, seconds=seconds), allow_dirty=chosen.allow_dirty)
        _keep(files(network).assign(**whose, model=name))
        print(name, scores, flush=True)
    return 0


def _keep(rows: pd.DataFrame) -> None:
    """Put a network's files with the others', in place of its earlier ones."""
    path, whose = kept_files(), ["data", "edition", "seed", "model"]
    with locked(path.parent):
        if path.exists():
            kept = pd.read_csv(path)
            same = (kept[whose] == rows[whose].iloc[0]).all(axis=1)
            rows = pd.concat([kept[~same], rows], ignore_index=True)
        order = [*whose[:-1], "part", "image", "model", "view"]  # like beside like, which packs well
        rows = rows[[*order, "identity", "probability"]].sort_values(order, kind="stable")
        rows = rows.round({"probability": 4})
        with replacing(path) as part:
            rows.to_csv(part, index=False, compression={"method": "gzip", "mtime": 0})


if __name__ == "__main__":
    sys.exit(main())
