"""The baseline of notebook 01_02: the floor that each of the three solutions has to beat.

An ImageNet-trained EfficientNet-Lite0, fine-tuned as a classifier of the known whales; a whale is named by its nearest
photographs (cosine) and `new_whale` where none is near enough.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from whalelib import augment
from whalelib.data import NEW_WHALE, Catalog, read_image
from whalelib.data.masks import mask_pixels
from whalelib.data.photographs import Photographs
from whalelib.files import making
from whalelib.identify import choose_threshold, embed, hold_out, identity_similarity, threshold_curve, top5
from whalelib.locate import cache_folder, code_of
from whalelib.losses import cross_entropy
from whalelib.models import Identifier
from whalelib.run import Run, by_profile
from whalelib.train import fit, warm_cosine

SIZES = by_profile((96, 192), (256, 512))  # (H, W) of the input
PASSES = by_profile(8_000, 1_000_000, small=256_000)  # images to train with, the same ones again and again
EPOCHS = by_profile((3, 14), (20, 60), small=(32, 448))  # fewest and most


def epochs(profile: str, photographs: int) -> int:
    """Return how often to go through so many photographs: PASSES in all, within EPOCHS."""
    fewest, most = EPOCHS[profile]
    return max(fewest, min(most, round(PASSES[profile] / max(photographs, 1))))


def budget(profile: str, rest: Catalog) -> int:
    """Return how many images the baseline sees where it is trained on the known whales of `rest`."""
    photographs = len(named(rest))
    return epochs(profile, photographs) * photographs


def network(identities: int, seed: int) -> Identifier:
    """Return the network; the first layers keep their ImageNet weights, which costs little and saves a quarter."""
    return Identifier(identities, frozen=("conv_stem", "bn1", "blocks.0", "blocks.1"), seed=seed)


def optimizer(model: Identifier) -> torch.optim.Optimizer:
    """Return AdamW: lr 1e-3 for the pretrained backbone, ten times that for what starts from nothing."""
    new = [*model.neck.parameters(), *model.head.parameters()]
    groups = [
        {"params": [p for p in model.backbone.parameters() if p.requires_grad]},
        {"params": new, "lr": 1e-2},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, weight_decay=1e-2)


def schedule(total: int) -> Callable[[float], float]:
    """Return the learning rate's factor by epoch: a rise over the first tenth of `total`, then half a cosine."""
    return partial(warm_cosine, epochs=total)


def loss(output: dict, batch: dict) -> torch.Tensor:
    """Return the softmax cross entropy of a batch of known whales."""
    return cross_entropy(output["logits"], batch["label"])


def named(catalog: Catalog) -> Catalog:
    """Return the photographs whose whale is known: all that a classifier can learn from."""
    identity = catalog.table["identity"]
    return catalog.where((identity.notna() & (identity != NEW_WHALE)).to_numpy(dtype=bool))


def training_code(*others: object) -> str:
    """Return a hash of the code that decides a trained network's weights, as `locate.code_of`.

    That of every recipe; others: modules, classes and functions of one recipe. What it is trained on goes into the
    cache's key by its fingerprint instead.
    """
    modules = (augment.augmented, cross_entropy, Identifier, fit, read_image, mask_pixels, Photographs)
    return code_of(*map(inspect.getmodule, modules), *others)


def pixels_folder() -> Path:
    """Return where decoded photographs are kept, of all data and recipes; the files' names tell them apart."""
    return cache_folder("pixels", code_of(*map(inspect.getmodule, (read_image, mask_pixels, Photographs))))


def folder(run: Run, epochs: int) -> Path:
    """Return where the network trained on a run's data so often is kept."""
    code = training_code(network, optimizer, schedule, loss, named, hold_out)
    return run.folder("baseline", code=code, epochs=epochs, size=SIZES[run.settings.profile])


@dataclass(frozen=True)
class Trained:
    """A trained network, its history, and the photographs that `answer` takes: rest, held out, queries."""

    model: Identifier
    history: pd.DataFrame
    photographs: tuple[Photographs, Photographs, Photographs]


def trained(run: Run, images: float = 1.0) -> Trained:
    """Train the baseline on a run's data as notebook 01_02 does, or fetch it from the cache.

    images: times the budget.
    """
    size, seed = SIZES[run.settings.profile], run.settings.seed
    pixels = pixels_folder()
    rest, held = hold_out(run.catalog.train, seed=seed)
    parts = tuple(
        Photographs(part, size, known=rest.known, folder=pixels) for part in (rest, held, run.catalog.test)
    )
    data = Photographs(
        named(rest), size, known=rest.known, transform=augment.baseline(size), seed=seed, folder=pixels
    )
    total = round(epochs(run.settings.profile, len(data)) * images)
    model, home = network(len(rest.known), seed).to(run.device), folder(run, total)
    with making(home / "log.csv"):
        history = fit(
            model,
            data,
            loss,
            epochs=total,
            optimizer=optimizer,
            schedule=schedule(total),
            seed=seed,
            **run.resources,
            folder=home,
        )
    return Trained(model, history.assign(images=history["steps"] * min(32, len(data))), parts)


@dataclass(frozen=True)
class Answer:
    """What a network makes of the queries.

    guesses: (Q, 5) labels, best first; threshold: below which nobody is near, chosen on held-out photographs;
    held_score: MAP@5 on those, at that threshold (optimistic); similarity: (Q, C); identities: (C,).
    """

    guesses: np.ndarray
    threshold: float
    held_score: float
    similarity: np.ndarray
    identities: np.ndarray


def answer(model, gallery: Photographs, held: Photographs, queries: Photographs) -> Answer:
    """Name the queries' whales by their nearest photographs.

    model: has `embed`; or several that have, whose similarities are averaged. gallery: photographs the model may have
    been trained on; held: labelled ones that it was not, with which the threshold is chosen and which join the gallery
    afterwards; queries: Q of them.
    """
    views = model if isinstance(model, Sequence) else (model,)
    parts = (gallery, held, queries)
    known = [part.catalog.table["identity"].to_numpy(dtype=object) for part in parts[:2]]
    return answer_of([[embed(view, part) for part in parts] for view in views], *known)


def answer_of(
    views: Sequence[Sequence[np.ndarray]], gallery_names: np.ndarray, held_names: np.ndarray
) -> Answer:
    """Name the queries' whales as `answer` does, by embeddings.

    views: of each the embeddings of gallery, held and queries, unit rows; similarities are averaged over the views.
    """
    similarity, identities = _mean(identity_similarity(view[1], view[0], gallery_names) for view in views)
    threshold = choose_threshold(similarity, identities, held_names)
    held_score = threshold_curve(similarity, identities, held_names)[1].max()
    named = np.concatenate([gallery_names, held_names])
    similarity, identities = _mean(
        identity_similarity(view[2], np.concatenate(view[:2]), named) for view in views
    )
    return Answer(
        top5(similarity, identities, threshold), threshold, float(held_score), similarity, identities
    )


def _mean(found: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    similarities, identities = zip(*found, strict=True)
    return sum(similarities) / len(similarities), identities[0]
