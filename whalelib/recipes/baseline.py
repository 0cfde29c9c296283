"""The baseline of notebook 01_02: the floor that each of the three solutions has to beat.

An ImageNet-trained EfficientNet-Lite0, fine-tuned as a classifier of the known whales; a whale is named by its nearest
photographs (cosine) and `new_whale` where none is near enough.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from whalelib.data import NEW_WHALE, Catalog
from whalelib.data.photographs import Photographs
from whalelib.identify import choose_threshold, embed, identity_similarity, threshold_curve, top5
from whalelib.losses import cross_entropy
from whalelib.models import Identifier
from whalelib.train import warm_cosine

SIZES = {"lab": (96, 192), "paper": (256, 512)}  # (H, W) of the input
PASSES = {"lab": 8_000, "paper": 1_000_000}  # images to train with, the same ones again and again
EPOCHS = {"lab": (3, 14), "paper": (20, 60)}  # fewest and most


def epochs(profile: str, photographs: int) -> int:
    """Return how often to go through so many photographs: PASSES in all, within EPOCHS."""
    fewest, most = EPOCHS[profile]
    return max(fewest, min(most, round(PASSES[profile] / max(photographs, 1))))


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
