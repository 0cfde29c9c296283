"""The first place solution of Qiao et al. (chapter 3 of the report), from photographs to five guesses.

Fluke masks and boxes, ten augmentations, mirrored flukes as whales of their own, a network with a global and a local
head, two triplet losses and a binary cross-entropy, three steps of training, and class probabilities averaged over each
photograph and its mirror image.

Editions. Where the report says nothing, both do what the solution's code does. Where report and code contradict each
other, `as_described` follows the report and `as_shipped` the code; every part names its own differences.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from whalelib import augment, locate, weights
from whalelib.data import Catalog
from whalelib.data.photographs import Photographs
from whalelib.data.quadruplets import Quadruplets
from whalelib.files import making, replacing
from whalelib.identify import (
    choose_threshold,
    class_balance,
    confidence_of,
    embed,
    hold_out,
    top5,
)
from whalelib.losses import aligned, euclidean, top_errors, triplet
from whalelib.metrics import map_at_k, top_k_accuracy
from whalelib.models import SENET154_MEAN, SENET154_STD, FirstPlace, senet154
from whalelib.recipes import baseline
from whalelib.recipes.baseline import Answer
from whalelib.run import Run, by_profile
from whalelib.train import evaluating, fit, load_best, load_weights, save_weights

SIZES = baseline.SIZES
BATCH = by_profile(6, 12)  # quadruplets, of four images each
EPOCH = by_profile(20, 200)  # batches, about; the solution's code validated as often
GATE = 0.5  # on training batches, a constant for new_whale


# What an ablation may leave out.
PARTS = ("boxes", "mirrored whales", "global triplet", "local triplet", "cross-entropy")


@dataclass(frozen=True)
class Step:
    """One of the three steps of training.

    minimum: photographs a class must have; share: of the images of the whole training; rate: Adam's; frozen: the
    backbone but its last two resolutions; enough: MAP@5 on the training batches at which the step ends early.
    """

    minimum: int
    share: float
    rate: float
    frozen: bool = False
    enough: float = np.inf


# Section 3.3.4. A laptop takes hundreds of steps where the report took 67,000: smaller batches, larger rates, and a
# first step that asks for fewer photographs, since its data have fewer.
STEPS = by_profile(
    (Step(3, 0.2, 1e-3, enough=0.98), Step(1, 0.7, 1e-3, True), Step(1, 0.1, 1e-4, True)),
    (Step(10, 0.34, 3e-4, enough=0.98), Step(1, 0.65, 3e-4, True), Step(1, 0.01, 3e-5, True)),
)

# Over the contest's photographs these make the 67,200 steps of 20 images of Table 3.2's first model.
PASSES = 95


def loss(
    output: dict, batch: dict, *, edition: str = "as_described", without: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """Return the three losses, the sum of all but those in `without` as `loss`, and MAP@5 on the batch (section 3.3.3).

    The local distance is Euclidean as described, the shortest path of AlignedReID as shipped.
    """
    labels, logits = batch["label"].flatten(), output["logits"]
    new = logits.shape[1]
    local = output["local"]
    apart = aligned(local) if edition == "as_shipped" else euclidean(local.flatten(1))
    parts = {
        "global triplet": triplet(euclidean(output["global"]), labels, new),
        "local triplet": triplet(apart, labels, new),
        "cross-entropy": top_errors(logits, labels),
    }
    total = sum(value for name, value in parts.items() if name not in without)
    return {"loss": total, **parts, "MAP@5": batch_map(logits.detach(), labels)}


def batch_map(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return MAP@5 of logits (N, 2C) on labels (N,), 2C being new_whale with the probability GATE."""
    gate = torch.zeros(len(logits), 1, device=logits.device, dtype=logits.dtype)  # the logit of 0.5
    hit = torch.cat([logits, gate], 1).topk(5).indices == labels[:, None]
    return (hit / torch.arange(1, 6, device=hit.device)).sum(1).mean()


def network(profile: str, identities: int, edition: str, seed: int, bias: bool = True) -> FirstPlace:
    """Return the network of a profile: EfficientNet-Lite0 on a laptop (`lab`), SENet-154 as in the report (`paper`).

    SENet-154's ImageNet weights are those that :func:`whalelib.weights.found` finds; without them a warning says where
    to get them, and the network starts from random ones.
    """
    if profile != "paper":
        return FirstPlace(identities, edition=edition, bias=bias, seed=seed)
    stem = "random" if edition == "as_shipped" else "mask"
    found = weights.pretrained("senet154")
    backbone = senet154(stem, found, sha256=weights.known("senet154"), seed=seed)
    pixels = {"mean": SENET154_MEAN, "std": SENET154_STD}
    return FirstPlace(identities, backbone, edition=edition, bias=bias, seed=seed, **pixels)


def optimizer(model: FirstPlace, kind: str = "Adam") -> torch.optim.Optimizer:
    """Return Adam with betas (.9, .99) and weight decay 2e-4 in the gradient, over what is not frozen."""
    learned = [p for p in model.parameters() if p.requires_grad]
    return getattr(torch.optim, kind)(learned, lr=3e-4, betas=(0.9, 0.99), weight_decay=2e-4)


def probabilities(model: FirstPlace, photographs: Photographs, *, batch_size: int = 64) -> np.ndarray:
    """Return (Q, C): each whale's probability, the mean of a photograph's and its mirror image's (section 3.2.1)."""
    return both_probabilities(model, photographs, batch_size=batch_size).mean(0)


@torch.inference_mode()
def both_probabilities(
    model: torch.nn.Module, photographs: Photographs, *, batch_size: int = 64
) -> np.ndarray:
    """Return (2, Q, C): each whale's probability by the photograph, and by its mirror image.

    Args:
        model: from images to ``logits`` (N, 2C).
        photographs: Q of them.
        batch_size: at a time.
    """
    rows = []
    with evaluating(model) as device:
        for batch in tqdm(DataLoader(photographs.plain(), batch_size=batch_size), "Naming", leave=False):
            images = batch["image"].to(device)
            rows.append(whales_of(*(model(x)["logits"].float().sigmoid() for x in (images, images.flip(-1)))))
    return torch.cat(rows, 1).cpu().numpy()


def whales_of(plain: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Return (2, Q, C) of what a network says (Q, 2C) of photographs and of their mirror images.

    Of the photograph only the whales count, of the mirror image only the mirrored whales.
    """
    whales = plain.shape[1] // 2
    return torch.stack([plain[:, :whales], mirrored[:, whales:]])


@dataclass(frozen=True)
class Choices:
    """What an experiment may change of a training, and nothing else.

    quadruplets: a batch, None the profile's; optimizer: a class of `torch.optim`; bias: of the linear layer; size:
    (H, W), None the profile's; images: share of the budget; without: some of PARTS.

    Raises:
        ValueError: no such part.
    """

    quadruplets: int | None = None
    optimizer: str = "Adam"
    bias: bool = True
    size: tuple[int, int] | None = None
    images: float = 1.0
    without: tuple[str, ...] = ()

    def __post_init__(self):
        check_choices(self, PARTS)


def check_choices(choices: object, parts: Sequence[str]) -> None:
    """Check what a recipe's Choices leave out; a share of images of 1 is the same as one of 1.0.

    Raises:
        ValueError: what is left out is none of a recipe's parts.
    """
    if unknown := [name for name in choices.without if name not in parts]:
        raise ValueError(f"without {unknown[0]!r}: choose from {', '.join(parts)}")
    object.__setattr__(choices, "images", float(choices.images))


@dataclass(frozen=True)
class Parts:
    """The photographs as the recipe takes them: rest to train on, held out for thresholds, and queries to name.

    All have predicted or supplied boxes and masks. The known whales held out are the baseline's; a quarter of the new
    whales is held out too, the others are for the quadruplets.
    """

    rest: Catalog
    held: Catalog
    queries: Catalog
    size: tuple[int, int]
    seed: int
    masks: bool = True
    crop: str | None = "box"

    @property
    def known(self) -> list[str]:
        """The whales, in the order of the classes."""
        return self.rest.known

    def photographs(self, part: Catalog, transform=None, **options) -> Photographs:
        """Return photographs of a located catalog at the recipe's size; masks: with a fourth channel."""
        chosen = {
            "known": self.known,
            "crop": self.crop,
            "masks": self.masks,
            "transform": transform,
            "seed": self.seed,
        }
        return Photographs(part, self.size, **{**chosen, **options})


def parts(run: Run, size: tuple[int, int] | None = None, crop: str | None = "box") -> Parts:
    """Locate the flukes of the run's data, and part the photographs."""
    located = locate.located(run)
    rest, held = hold_out(located.train, new=0.25, seed=run.settings.seed)
    return Parts(rest, held, located.test, size or SIZES[run.settings.profile], run.settings.seed, crop=crop)


def budget(profile: str, parts: Parts) -> int:
    """Return how many images the recipe may see: the baseline's, or under `paper` PASSES of the known whales'."""
    if profile != "paper":
        return baseline.budget(profile, parts.rest)
    return PASSES * len(baseline.named(parts.rest))


@dataclass(frozen=True)
class Trained:
    """A trained network, the photographs it was trained on, and its history: one row an epoch, with the step."""

    model: FirstPlace
    parts: Parts
    history: pd.DataFrame


def trained(run: Run, choices: Choices | None = None) -> Trained:
    """Train the recipe in its three steps, or fetch it from the cache, or go on where a killed run stopped.

    Each step begins with the weights and Adam's state of the one before: of its best epoch on the held-out photographs
    in the `paper` profile, which validates after every epoch; of its last in `lab`, which validates after each step.
    """
    choices, settings = choices or Choices(), run.settings
    choices = replace(choices, quadruplets=choices.quadruplets or BATCH[settings.profile])
    here = parts(run, choices.size, None if "boxes" in choices.without else "box")
    given = settings.profile == "paper" and weights.content("senet154")
    data = [part.fingerprint for part in (here.rest, here.held)]
    key = {**asdict(choices), "size": here.size, "weights": given, "photographs": data}
    code = baseline.training_code(*map(inspect.getmodule, (Quadruplets, trained)))
    folder = run.folder("first", code=code, budget=budget(settings.profile, here), **key)
    model = network(settings.profile, len(here.known), settings.edition, settings.seed, choices.bias)
    model.to(run.device)
    history = trained_or_kept(model, folder, lambda: _train(run, choices, model, here, folder))
    return Trained(model, here, history)


def trained_or_kept(model: torch.nn.Module, folder: Path, train: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Give a model the weights that its folder keeps, and return their history; without them train it first.

    Args:
        model: of the shape that the weights are for.
        folder: of the cache.
        train: trains the model and returns the history.
    """
    log = folder / "history.csv"
    with making(log) as writes:
        if not log.exists():
            history = train()
            if writes:
                save_weights(model, folder / "trained.safetensors")
                with replacing(log) as part:
                    history.to_csv(part, index=False)
    load_weights(model, folder / "trained.safetensors")
    return pd.read_csv(log)


def _train(run: Run, choices: Choices, model: FirstPlace, here: Parts, folder: Path) -> pd.DataFrame:
    settings = run.settings
    profile, edition = settings.profile, settings.edition
    learner = optimizer(model, choices.optimizer)
    pixels = baseline.pixels_folder()
    rest = here.photographs(here.rest, augment.first_place(here.size, edition), folder=pixels)
    held = here.photographs(here.held, folder=pixels)
    quadruplets = budget(profile, here) * choices.images / 4
    tables = []
    for number, step in enumerate(STEPS[profile]):
        epochs, items = _epochs(quadruplets * step.share, choices.quadruplets, EPOCH[profile])
        data = Quadruplets(
            rest,
            items,
            minimum=step.minimum,
            flip=0.0 if "mirrored whales" in choices.without else 0.5,
            flips="each" if edition == "as_shipped" else "pair",
            seed=settings.seed * len(STEPS[profile]) + number,
        )
        if step.frozen:
            model.freeze()
        for group in learner.param_groups:
            group["lr"] = step.rate
        best = "valid MAP@5" if profile == "paper" else None
        home = folder / f"step-{number + 1}"
        history = fit(
            model,
            data,
            partial(loss, edition=edition, without=choices.without),
            epochs=epochs,
            folder=home,
            batch_size=choices.quadruplets,
            optimizer=lambda _: learner,
            clip=5.0,
            seed=data.seed,
            **run.resources,
            stop=partial(_enough, step=step),
            on_epoch=partial(_validate, held=held, epochs=None if best else epochs, step=step),
            best=best,
        )
        if best:
            load_best(model, learner, home)
        tables.append(history.assign(step=number + 1, images=history["steps"] * choices.quadruplets * 4))
    return pd.concat(tables, ignore_index=True)


def _epochs(quadruplets: float, batch: int, most: int) -> tuple[int, int]:
    """Return epochs and items an epoch, about so many batches, that make so many quadruplets."""
    batches = max(1, round(quadruplets / batch))
    epochs = max(1, round(batches / most))
    return epochs, max(1, round(batches / epochs)) * batch


def _enough(row: dict, *, step: Step) -> bool:
    return row["MAP@5"] >= step.enough


def _validate(model: FirstPlace, row: dict, *, held: Photographs, epochs: int | None, step: Step) -> dict:
    """Return the scores on held-out photographs, at the best threshold for them: after each epoch, or the last."""
    if epochs and row["epoch"] < epochs and not _enough(row, step=step):
        return {}
    return validation(model, held)


def validation(model: torch.nn.Module, held: Photographs) -> dict[str, float]:
    """Return MAP@5 and Top@1 by classes on held-out photographs, at the best threshold for them, and that."""
    truth = held.catalog.table["identity"].to_numpy(dtype=object)
    found = probabilities(model, held)
    threshold = choose_threshold(found, held.known, truth)
    guesses = top5(found, held.known, threshold)
    scores = {
        "MAP@5": map_at_k(guesses, truth),
        "Top@1": top_k_accuracy(guesses, truth, 1),
        "threshold": threshold,
    }
    return {f"valid {name}": value for name, value in scores.items()}


BY = ("classes", "neighbours")


class Mirrored(torch.nn.Module):
    """A network that sees every photograph mirrored."""

    def __init__(self, model: FirstPlace):
        super().__init__()
        self.model = model

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of the mirror images of images (N, C, H, W)."""
        return self.model.embed(images.flip(-1))


def by_neighbours(networks: Sequence[Trained], mirrored: bool = True) -> Answer:
    """Name the queries' whales by cosines to the nearest labelled photographs, a mean over the networks; ours.

    mirrored: also by cosines of mirror image to mirror image. The threshold is chosen as the baseline's.
    """
    views = []
    for one in networks:
        here = one.parts
        photographs = [here.photographs(part) for part in (here.rest, here.held, here.queries)]
        for view in (one.model, Mirrored(one.model))[: 1 + mirrored]:
            views.append([embed(view, part) for part in photographs])
    names = [part.table["identity"].to_numpy(dtype=object) for part in (here.rest, here.held)]
    return baseline.answer_of(views, *names)


def answer(trained: Trained, by: str = "classes") -> Answer:
    """Name the queries' whales.

    By "classes", as the solution: probabilities of photograph and mirror image. As shipped the constant for new_whale
    is the best of .1, .2, ... .9 on the held-out photographs; as described any number may be, and the classes are
    balanced (section 3.2.3). By "neighbours": see :func:`by_neighbours`, with the global features.
    """
    if by not in BY:
        raise ValueError(f"by = {by!r}: choose one of {', '.join(BY)}")
    here, model = trained.parts, trained.model
    if by == "neighbours":
        return by_neighbours([trained])
    truth = here.held.table["identity"].to_numpy(dtype=object)
    held, found = (probabilities(model, here.photographs(part)) for part in (here.held, here.queries))
    threshold = choose_threshold(held, here.known, truth)
    if model.edition == "as_shipped":
        scores = {t: map_at_k(top5(held, here.known, t), truth) for t in np.linspace(0.1, 0.9, 9).round(1)}
        threshold = max(scores, key=scores.get)
    held_score = map_at_k(top5(held, here.known, threshold), truth)
    guesses = top5(found, here.known, threshold)
    if model.edition == "as_described":
        guesses, _ = class_balance(guesses, confidence_of(guesses, found, here.known, threshold))
    return Answer(guesses, float(threshold), float(held_score), found, np.array(here.known, dtype=object))
