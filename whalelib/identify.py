"""From embeddings to five guesses: cosine neighbours, and ``new_whale`` where none is near enough.

Sections 1 and 5.4 of the report. Whatever the network, this is how the course names a whale.
"""

import hashlib
import inspect
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest
from torch import nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from whalelib.data import read_image
from whalelib.data.layouts import NEW_SHARE
from whalelib.data.photographs import Photographs
from whalelib.files import replacing
from whalelib.locate import code_of, weights_hash
from whalelib.metrics import GUESSES, NEW_WHALE
from whalelib.run import place
from whalelib.train import evaluating, keep_memory

if TYPE_CHECKING:
    from whalelib.data.catalog import Catalog

FAISS = 10_000
_keeps = ContextVar("keeps", default=True)


@contextmanager
def embedded_anew() -> Iterator[None]:
    """In here :func:`embed` computes everything, for who wants to know what that takes."""
    token = _keeps.set(False)
    try:
        yield
    finally:
        _keeps.reset(token)


def embed(
    model: nn.Module, photographs: Photographs, *, batch_size: int = 64, augmented: bool = False
) -> np.ndarray:
    """Return the photographs' embeddings, on the device where the model is.

    Those of a network of ours, without augmentation, are kept in the cache, where notebooks find each other's.

    Args:
        model: has ``embed(images (N, 3, H, W)) -> (N, D)``. It runs in evaluation mode and is left as it was.
        photographs: N of them.
        batch_size: images at a time.
        augmented: with the photographs' own augmentation instead of none.

    Returns:
        (N, D) float32, rows of length 1.
    """
    read = photographs if augmented else photographs.plain()
    kept = None if augmented or not _keeps.get() else _kept_at(model, read, batch_size)
    if kept is None:
        return _embedded(model, read, batch_size)
    with suppress(OSError, ValueError, EOFError):  # of a file that is not there, or damaged
        return np.load(kept, allow_pickle=False)
    rows = _embedded(model, read, batch_size)
    with replacing(kept) as part, part.open("wb") as file:
        np.save(file, rows)
    return rows


def _kept_at(model: nn.Module, photographs: Photographs, batch_size: int) -> Path | None:
    """Return the file in the cache that keeps what this model makes of these photographs.

    It is named by all that decides them: weights, plain attributes and code. None where that can't be told: of models
    that others defined, that hold functions, or that draw at random.
    """
    ours = [each for each in model.modules() if type(each).__module__.startswith("whalelib.")]
    base, plain = vars(nn.Module()), (bool, int, float, str, tuple, type(None))
    told = [{name: value for name, value in vars(each).items() if name not in base} for each in ours]
    known = model in ours and hasattr(photographs, "fingerprint")
    known &= all(isinstance(value, plain) for each in told for value in each.values())
    if not known or any(each.get("dropout_always") for each in told):
        return None
    code = {inspect.getmodule(type(each)) for each in (*ours, photographs)} | {inspect.getmodule(read_image)}
    key = [code_of(*sorted(code, key=lambda module: module.__name__), _embedded), weights_hash(model)]
    key += [
        repr(model),
        repr(told),
        photographs.fingerprint,
        batch_size,
        next(model.parameters()).device.type,
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    return place("WHALE_CACHE", "data/cache") / "embeddings" / f"{digest}.npy"


@torch.inference_mode()
def _embedded(model: nn.Module, read: Photographs, batch_size: int) -> np.ndarray:
    keep_memory()
    with evaluating(model) as device:
        loader = tqdm(DataLoader(read, batch_size=batch_size), "Embedding", leave=False)
        rows = [nn.functional.normalize(model.embed(batch["image"].to(device)).float()) for batch in loader]
    return torch.cat(rows).cpu().numpy()


def cosine_by_strength(
    model: nn.Module, photographs: Photographs, transforms: Mapping, *, batch_size: int = 64
) -> pd.DataFrame:
    """Return how near the embeddings of changed photographs stay to those of the originals.

    Args:
        model: as for ``embed``.
        photographs: N of them; their own augmentation is not used.
        transforms: strength -> an albumentations step or pipeline, or None for no change.
        batch_size: images at a time.

    Returns:
        A row each strength: strength, and of the N cosines mean, low and high (the tenth and the ninetieth
        percentile).

    Raises:
        ValueError: no photographs.
    """
    if not len(photographs):
        raise ValueError("no photographs to embed")
    original = embed(model, photographs, batch_size=batch_size)
    rows = []
    for strength, transform in transforms.items():
        changed = photographs.plain()
        changed.transform = transform
        cosine = (original * embed(model, changed, batch_size=batch_size, augmented=True)).sum(axis=1)
        rows.append([strength, cosine.mean(), *np.quantile(cosine, (0.1, 0.9))])
    return pd.DataFrame(rows, columns=["strength", "mean", "low", "high"])


def mean_cosines(
    embeddings: np.ndarray, identity, gallery: np.ndarray | None = None, gallery_identity=None
) -> dict[str, float]:
    """Return what to measure a cosine by: the mean over pairs of one whale and over pairs of two.

    Args:
        embeddings: (N, D) unit rows.
        identity: (N,) identities; rows of ``new_whale`` or without one are left out.
        gallery: (G, D) unit rows of other photographs, for pairs of one of each; default pairs of the N.
        gallery_identity: (G,) identities.

    Returns:
        "same whale" and "other whale"; NaN where there is no such pair.
    """
    rows, names = _named(embeddings, identity)
    if gallery is None:
        cosine, same = rows @ rows.T, names[:, None] == names
        pairs = ~np.tri(len(rows), dtype=bool)
    else:
        others, other_names = _named(gallery, gallery_identity)
        cosine, same = rows @ others.T, names[:, None] == other_names
        pairs = np.ones_like(same)
    groups = {"same whale": cosine[same & pairs], "other whale": cosine[~same & pairs]}
    return {name: float(values.mean()) if len(values) else float("nan") for name, values in groups.items()}


def _named(embeddings: np.ndarray, identity) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of named whales and their names."""
    identity = np.asarray(identity, dtype=object)
    named = ~pd.isna(identity) & (identity != NEW_WHALE)
    return embeddings[named], identity[named].astype(str)


def identity_similarity(
    queries: np.ndarray, gallery: np.ndarray, gallery_identity, *, chunk: int = 512
) -> tuple[np.ndarray, np.ndarray]:
    """Return how near each query is to each identity: the cosine of its nearest photograph.

    Args:
        queries: (Q, D) unit rows.
        gallery: (G, D) unit rows.
        gallery_identity: (G,) identities; rows of ``new_whale`` or without one are left out.
        chunk: queries at a time, which bounds the memory: chunk x G floats.

    Returns:
        (Q, C) float32 similarities and (C,) identities, sorted.

    Raises:
        ValueError: lengths differ, or no row of the gallery has an identity.
    """
    identity = np.asarray(gallery_identity, dtype=object)
    if identity.shape != (len(gallery),):
        raise ValueError(f"{len(gallery)} rows of the gallery, {identity.shape} identities")
    named = np.flatnonzero(~pd.isna(identity) & (identity != NEW_WHALE))
    if not len(named):
        raise ValueError("no photograph of the gallery has an identity")
    identities, place = np.unique(identity[named].astype(str), return_inverse=True)
    order = np.argsort(place, kind="stable")
    first = np.searchsorted(place[order], np.arange(len(identities)))
    columns = np.asarray(gallery, dtype=np.float32)[named[order]].T
    similarity = np.empty((len(queries), len(identities)), dtype=np.float32)
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        np.maximum.reduceat(
            np.asarray(queries[rows], dtype=np.float32) @ columns, first, axis=1, out=similarity[rows]
        )
    return similarity, identities


def top5(similarity: np.ndarray, identities, threshold: float) -> np.ndarray:
    """Return each query's five guesses, with ``new_whale`` before the first identity below the threshold.

    As the third solution places it (section 5.4): once, and not at all where five identities reach the
    threshold. Of identities equally near, the one that ``identities`` lists first comes first.

    Args:
        similarity: (Q, C).
        identities: (C,).
        threshold: in units of the similarity.

    Returns:
        (Q, 5) objects: str, best first. With fewer than five identities ``new_whale`` comes after them at the
        latest, and None fills the row.

    Raises:
        ValueError: lengths differ, no identities, or a similarity that is NaN.
    """
    nearest, place = _nearest(similarity, identities)
    found = place.shape[1]
    names = np.array([*np.asarray(identities, dtype=object), NEW_WHALE, None], dtype=object)
    above = (nearest >= threshold).sum(axis=1, keepdims=True)
    rank = np.arange(GUESSES)
    guesses = np.pad(place, ((0, 0), (0, GUESSES - found)), constant_values=len(names) - 1)
    shifted = np.take_along_axis(guesses, rank - (rank > above), axis=1)
    return names[np.where(rank == above, len(names) - 2, shifted)]


def threshold_curve(
    similarity: np.ndarray, identities, truth, new_share: float = NEW_SHARE
) -> tuple[np.ndarray, np.ndarray]:
    """Return MAP@5 at every threshold that makes a difference, exactly.

    Args:
        similarity: (Q, C) of labelled queries.
        identities: (C,).
        truth: (Q,) right answers; whatever is not in ``identities`` counts as ``new_whale``.
        new_share: share of ``new_whale`` to weight the queries to: a held-out set seldom has the contest's.

    Returns:
        Thresholds (T,), falling, one between each two neighbouring similarities, and the MAP@5 (T,) of each.

    Raises:
        ValueError: as ``top5``; or new or known whales have a weight but no query.
    """
    nearest, place = _nearest(similarity, identities)
    names = np.asarray(identities, dtype=object)
    truth = np.asarray(truth, dtype=object)
    if truth.shape != (len(nearest),):
        raise ValueError(f"{len(nearest)} queries, right answers of shape {truth.shape}")
    if unlabelled := pd.isna(truth).sum():
        raise ValueError(f"{unlabelled} of {len(truth)} queries have no right answer")
    if not 0 <= new_share <= 1:
        raise ValueError(f"new_share = {new_share}: give a share from 0 to 1")
    new = ~np.isin(truth.astype(str), names.astype(str))
    for group, share, rows in (("new", new_share, new.sum()), ("known", 1 - new_share, (~new).sum())):
        if share and not rows:
            raise ValueError(f"no query of a {group} whale, but new_share = {new_share} gives them a weight")
    weight = np.where(new, new_share / max(new.sum(), 1), (1 - new_share) / max((~new).sum(), 1))[:, None]
    # A threshold that falls past a query's r-th similarity moves new_whale from rank r to r + 1 and the
    # r-th identity from r + 1 to r; a guess at rank r is worth 1 / r, beyond the fifth nothing.
    worth = np.append(1 / np.arange(1, GUESSES + 1), 0)[: nearest.shape[1] + 1]
    gain = worth[:-1] - worth[1:]
    right = names[place] == truth[:, None]
    change = weight * np.where(new[:, None], -gain, gain * right)
    start = (weight[:, 0] * new).sum() + (weight * right * worth[1:]).sum()
    values, where = np.unique(nearest, return_inverse=True)
    steps = np.bincount(where.ravel(), change.ravel(), len(values))
    telling = steps != 0 if steps.any() else np.ones(len(steps), dtype=bool)
    values, steps = values[telling][::-1], steps[telling][::-1]
    ends = np.nextafter(values[[0, -1]], [np.inf, -np.inf])
    thresholds = np.concatenate([ends[:1], (values[:-1] + values[1:]) / 2, ends[1:]])
    return thresholds, start + np.append(0, np.cumsum(steps))


def choose_threshold(similarity: np.ndarray, identities, truth, new_share: float = NEW_SHARE) -> float:
    """Return the threshold with the highest MAP@5 on labelled queries; arguments as ``threshold_curve``.

    Take queries that the network was not trained on: to those it was, their own whale is nearer than it
        will ever be.
    """
    thresholds, scores = threshold_curve(similarity, identities, truth, new_share)
    return float(thresholds[scores.argmax()])


def expected_threshold(similarity: np.ndarray, new_share: float = NEW_SHARE) -> float:
    """Return the threshold that makes ``new_whale`` the first guess of an expected share of the queries.

    The third solution's way (section 5.5), which needs no labels: its .385 was to give 27.6 %.

    Args:
        similarity: (Q, C).
        new_share: of the queries.

    Raises:
        ValueError: no queries, or a share outside 0 to 1.
    """
    if not similarity.size or not 0 <= new_share <= 1:
        raise ValueError(f"similarities of shape {similarity.shape}, new_share = {new_share}")
    best = np.sort(similarity.max(axis=1))
    place = round(new_share * len(best))
    ends = np.concatenate([[best[0] - 1], best, [best[-1] + 1]]).astype(float)
    return float(ends[place : place + 2].mean())


def centre(features: np.ndarray) -> np.ndarray:
    """Return the templates (..., D), of length 1, of pools of features (section 5.4).

    The mean direction of the features that are near it. Twice, while a pool has four or more left: of all that have a
    cosine above .5 to their mean, if these are more than three quarters, else of the nearest three quarters. (In the
    report a quarter is always discarded, and photographs are counted; in the code, features.)

    Args:
        features: (..., N, D) unit rows, a pool of N each.
    """
    features = np.asarray(features)
    kept = np.ones(features.shape[:-1], dtype=bool)
    for _ in range(2):
        count = kept.sum(axis=-1, keepdims=True)
        cosine = np.einsum("...nd,...d->...n", features, _direction(features, kept))
        cosine = np.where(kept, cosine, -np.inf)
        near = cosine > 0.5
        rank = np.argsort(np.argsort(-cosine, axis=-1, kind="stable"), axis=-1)
        fewer = np.where(near.sum(axis=-1, keepdims=True) > 0.75 * count, near, rank < 3 * count // 4)
        kept = np.where(count < 4, kept, fewer)
    return _direction(features, kept)


def _direction(features: np.ndarray, kept: np.ndarray) -> np.ndarray:
    total = np.einsum("...nd,...n->...d", features, kept.astype(features.dtype))
    return total / np.maximum(np.linalg.norm(total, axis=-1, keepdims=True), 1e-12)


def templates(features: np.ndarray, identity) -> tuple[np.ndarray, np.ndarray]:
    """Return one embedding an identity, the :func:`centre` of all its photographs' features.

    Args:
        features: (N, V, D) unit rows, V views of each of N photographs.
        identity: (N,) identities; rows of ``new_whale`` or without one are left out.

    Returns:
        (C, D) and (C,) identities, sorted.
    """
    rows, names = _named(features, identity)
    identities, place, counts = np.unique(names, return_inverse=True, return_counts=True)
    order = np.argsort(place, kind="stable")
    starts = np.cumsum(counts) - counts
    found = np.empty((len(identities), features.shape[-1]), dtype=features.dtype)
    for count in np.unique(counts):  # pools of one size at a time
        chosen = np.flatnonzero(counts == count)
        pools = rows[order[starts[chosen, None] + np.arange(count)]]
        found[chosen] = centre(pools.reshape(len(chosen), -1, features.shape[-1]))
    return found, identities


def template_similarity(queries: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Return the cosines of queries and templates, a mean over networks and views (section 5.5, equation 5.1).

    Args:
        queries: (..., Q, D) unit rows, for each network and view.
        templates: (..., C, D), the same.

    Returns:
        (Q, C) float32.
    """
    rows, columns = (
        torch.from_numpy(np.asarray(part, dtype=np.float32)).reshape(-1, *part.shape[-2:])
        for part in (queries, templates)
    )
    if len(rows) != len(columns):
        raise ValueError(f"queries of {len(rows)} views, templates of {len(columns)}")
    found = rows[0] @ columns[0].T
    for row, column in zip(rows[1:], columns[1:], strict=True):
        found.addmm_(row, column.T)
    return found.div_(len(rows)).numpy()


def nearest(
    queries: np.ndarray,
    gallery: np.ndarray,
    count: int = GUESSES,
    *,
    chunk: int = 65_536,
    faiss: bool | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest rows of a gallery, exactly, without ever holding all cosines.

    Args:
        queries: (Q, D) unit rows.
        gallery: (G, D) unit rows, however many.
        count: k, how many of them.
        chunk: rows of the gallery at a time, which bounds the memory: Q x chunk floats.
        faiss: let it search; default where it is installed and the gallery has FAISS rows or more, which it searches
            faster (`make bench`).

    Returns:
        Cosines (Q, k) float32, falling, and places (Q, k) in the gallery, k being at most G.

    Raises:
        ValueError: an empty gallery.
    """
    if not len(gallery):
        raise ValueError("an empty gallery")
    if faiss is None:
        faiss = len(gallery) >= FAISS and find_spec("faiss") is not None
    if faiss:
        from faiss import METRIC_INNER_PRODUCT, knn  # noqa: PLC0415 - optional

        rows = (np.ascontiguousarray(part, dtype=np.float32) for part in (queries, gallery))
        return knn(*rows, min(count, len(gallery)), metric=METRIC_INNER_PRODUCT)
    asked = torch.from_numpy(np.asarray(queries, dtype=np.float32))
    best, place = torch.empty(len(asked), 0), torch.empty(len(asked), 0, dtype=torch.int64)
    for start in range(0, len(gallery), chunk):
        rows = torch.from_numpy(np.asarray(gallery[start : start + chunk], dtype=np.float32))
        found, where = (asked @ rows.T).topk(min(count, len(rows)), dim=1)
        both, places = torch.cat([best, found], 1), torch.cat([place, where + start], 1)
        best, order = both.topk(min(count, both.shape[1]), dim=1)
        place = places.gather(1, order)
    return best.numpy(), place.numpy()


def confidence_of(guesses: np.ndarray, similarity: np.ndarray, identities, threshold: float) -> np.ndarray:
    """Return how sure each guess is: its similarity or probability; the threshold for ``new_whale``.

    Args:
        guesses: (Q, K) labels, as ``top5`` returns them; None is no guess.
        similarity: (Q, C).
        identities: (C,).
        threshold: that the guesses were made with.

    Returns:
        (Q, K) float64; NaN where there is no guess.

    Raises:
        ValueError: lengths differ, or a guess is none of the identities.
    """
    guesses, similarity = np.asarray(guesses, dtype=object), np.asarray(similarity)
    if similarity.shape != (len(guesses), len(identities)):
        raise ValueError(
            f"similarity of shape {similarity.shape} for {len(guesses)} rows, {len(identities)} identities"
        )
    place = pd.Index(identities).get_indexer(guesses.ravel()).reshape(guesses.shape)
    none = pd.isna(guesses)
    if unknown := set(guesses[(place < 0) & ~none]) - {NEW_WHALE}:
        raise ValueError(f"{min(map(str, unknown))} is a guess, but none of the identities")
    found = np.take_along_axis(similarity.astype(float), place, axis=1)
    return np.where(none, np.nan, np.where(guesses == NEW_WHALE, threshold, found))


def class_balance(
    guesses: np.ndarray, confidence: np.ndarray, gap: float = 0.3, many: int = 2, new: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Exchange first and second guess where that spreads the first places over more whales (section 3.2.3).

    That is where their confidence differs by less than ``gap``, the second is first nowhere, and the first is among
    the first two guesses of many photographs. The report has no number for "many" and does not say whether
    ``new_whale`` is a class, and no code was published. Ours are the number, that ``new_whale`` keeps its place (moving
    it costs points, see notebook 03_10), and that all exchanges are decided on the guesses as given, so that the
    order of the photographs does not matter.

    Args:
        guesses: (Q, 5) labels, best first, of all photographs to be named; None is no guess.
        confidence: (Q, 5) of the guesses, as ``confidence_of`` returns it.
        gap: in units of the confidence.
        many: photographs, this one included.
        new: whether ``new_whale`` takes part as a class like the others.

    Returns:
        (Q, 5) guesses and (Q,) booleans: which rows were exchanged.

    Raises:
        ValueError: shapes differ or hold no second guess, a guess without confidence, gap < 0, or many < 1.
    """
    guesses, confidence = np.array(guesses, dtype=object), np.asarray(confidence, dtype=float)
    if guesses.ndim != 2 or guesses.shape[1] < 2 or guesses.shape != confidence.shape:
        raise ValueError(f"guesses of shape {guesses.shape}, their confidence of shape {confidence.shape}")
    there = ~pd.isna(guesses)
    if unsure := (there & ~np.isfinite(confidence)).any(axis=1).sum():
        raise ValueError(f"{unsure} of {len(guesses)} rows have a guess whose confidence is not finite")
    if not gap >= 0 or many < 1:
        raise ValueError(f"gap = {gap}, many = {many}: give a gap from 0 up and a number from 1 up")
    both = there[:, :2].all(axis=1)
    first, second = guesses[:, 0], guesses[:, 1]
    uses = pd.Series(guesses[:, :2][there[:, :2]]).value_counts()
    swapped = both & (np.abs(confidence[:, 0] - confidence[:, 1]) < gap)
    swapped &= ~np.isin(second, first[there[:, 0]])
    swapped &= pd.Series(first).map(uses).fillna(0).to_numpy() >= many
    if not new:
        swapped &= (guesses[:, :2] != NEW_WHALE).all(axis=1)
    guesses[swapped, :2] = guesses[swapped, 1::-1]
    return guesses, swapped


def pseudo_labels(probability: np.ndarray, identities, images, confidence: float = 0.96) -> pd.DataFrame:
    """Label photographs with the most probable identity where that is sure enough (section 3.2.2).

    Args:
        probability: (Q, C) from 0 to 1; rows need not add up to 1.
        identities: (C,).
        images: (Q,) names of the photographs, each once.
        confidence: the label's probability must exceed it; below 0 every photograph gets its label.

    Returns:
        Columns image, identity, confidence, in the order of the photographs. Of equals the first identity counts.

    Raises:
        ValueError: lengths differ, no identities, a name twice, or a probability outside 0 to 1.
    """
    probability, images = np.asarray(probability), pd.Index(images)
    if probability.shape != (len(images), len(identities)) or not len(identities):
        raise ValueError(
            f"probabilities of shape {probability.shape} for {len(images)} photographs, "
            f"{len(identities)} identities"
        )
    if images.has_duplicates:
        raise ValueError(f"{images[images.duplicated()][0]} is named twice")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("probabilities must lie between 0 and 1; similarities or logits do not")
    best = probability.argmax(axis=1)
    sure = np.take_along_axis(probability, best[:, None], axis=1)[:, 0].astype(float)
    labels = np.asarray(identities, dtype=object)[best]
    frame = pd.DataFrame({"image": images, "identity": labels, "confidence": sure})
    return frame[sure > confidence].reset_index(drop=True)


def pseudo_label_precision(
    labels: pd.DataFrame, truth, steps=(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99)
) -> pd.DataFrame:
    """Return how many labels exceed each confidence, and what share of them is right.

    Args:
        labels: image, identity, confidence, as ``pseudo_labels`` returns them.
        truth: image -> right identity; a photograph of ``new_whale`` has no right label but that.
        steps: of confidence.

    Returns:
        A row each step: confidence, labels, right, precision, and low, high: its 95 % interval (Wilson's). Without
        labels the last three are NaN.

    Raises:
        ValueError: a photograph without a right identity.
    """
    answers = labels["image"].map(truth)
    if unknown := answers.isna().sum():
        raise ValueError(f"{unknown} of {len(labels)} labelled photographs have no right identity")
    right = (labels["identity"] == answers).to_numpy()
    rows = []
    for step in steps:
        sure = labels["confidence"].to_numpy() > step
        total, hits = int(sure.sum()), int(right[sure].sum())
        row = (
            [hits / total, *binomtest(hits, total).proportion_ci(method="wilson")] if total else [np.nan] * 3
        )
        rows.append([step, total, hits, *row])
    return pd.DataFrame(rows, columns=["confidence", "labels", "right", "precision", "low", "high"])


def top_probabilities(probability: np.ndarray, identities, images, count: int = GUESSES) -> pd.DataFrame:
    """Keep each photograph's most probable identities: a file of the second solution's ensemble (section 4.4).

    Args:
        probability: (Q, C).
        identities: (C,), without ``new_whale``.
        images: (Q,) names of the photographs, each once.
        count: of identities to keep a photograph.

    Returns:
        Columns image, identity, probability; ``count`` rows a photograph (C if that is less), the most probable first,
        in the order of the photographs. Of equals the first identity comes first.

    Raises:
        ValueError: lengths differ, no identities, a name twice, or a probability that is not finite.
    """
    images = pd.Index(images)
    if len(images) != len(probability):
        raise ValueError(f"probabilities of {len(probability)} photographs, {len(images)} names")
    if images.has_duplicates:
        raise ValueError(f"{images[images.duplicated()][0]} is named twice")
    best, place = _nearest(probability, identities, count)
    names = np.asarray(identities, dtype=object)[place]
    found = {"image": images.repeat(place.shape[1]), "identity": names.ravel(), "probability": best.ravel()}
    return pd.DataFrame(found)


def blend(
    files: Sequence[pd.DataFrame], weights: Sequence[float], new: float = 0.185
) -> tuple[np.ndarray, np.ndarray]:
    """Add up the weighted probabilities of several models' files, as the second solution does (section 4.4).

    An identity that a file leaves out has probability 0 there. ``new_whale`` gets ``new`` in every file, with the
    file's weight; the report has neither this rule nor the number.

    Args:
        files: each as ``top_probabilities`` returns it, one a model and view, with the same photographs.
        weights: one a file.
        new: probability of ``new_whale``.

    Returns:
        (Q, 5) guesses, objects: str, best first, and (Q, 5) float64 weighted sums, in the order of the first file's
        photographs. Of equals the identity that the files name first comes first. Where the files name fewer than
        four identities of a photograph, None and NaN fill the row.

    Raises:
        ValueError: not one weight a file, no file, a weight, ``new`` or a probability below 0 or not finite, other
            photographs than the first file's, or an identity twice for a photograph, or ``new_whale``, in a file.
    """
    if len(files) != len(weights) or not files:
        raise ValueError(f"{len(files)} files, {len(weights)} weights")
    if not (np.isfinite([new, *weights]).all() and min(new, *weights) >= 0):
        raise ValueError(f"new = {new}, weights {list(weights)}: give numbers from 0 up")
    images, ballots = pd.Index(files[0]["image"].unique()), []
    for number, (file, weight) in enumerate(zip(files, weights, strict=True)):
        rows = images.get_indexer(file["image"])
        if (rows < 0).any() or len(np.unique(rows)) < len(images):
            raise ValueError(f"file {number}: not the photographs of file 0")
        if file.duplicated(["image", "identity"]).any() or (file["identity"] == NEW_WHALE).any():
            raise ValueError(f"file {number}: {NEW_WHALE}, or an identity twice for one photograph")
        share = file["probability"].to_numpy(dtype=float)
        if not (np.isfinite(share) & (share >= 0)).all():
            raise ValueError(f"file {number}: probabilities below 0 or not finite")
        ballots.append((rows, file["identity"].to_numpy(dtype=object), weight * share))
        everyone = np.arange(len(images))
        ballots.append(
            (everyone, np.full(len(images), NEW_WHALE, dtype=object), np.full(len(images), weight * new))
        )
    return _tally(*(np.concatenate(parts) for parts in zip(*ballots, strict=True)), len(images))


def rank_vote(
    guesses: Sequence[np.ndarray],
    weights: Sequence[float],
    points: Sequence[float] = (1, 1 / 2, 1 / 3, 1 / 4, 1 / 5),
) -> np.ndarray:
    """Let submissions vote by the rank of their guesses, where their probabilities are not at hand.

    Args:
        guesses: each submission's (Q, 5) labels, best first, for the same photographs in the same order; None is no
            guess.
        weights: one a submission.
        points: of each rank, the first first; ranks beyond have none. By default what a right guess there is worth in
            MAP@5.

    Returns:
        (Q, 5) guesses, objects: the labels with most points, ``new_whale`` as one of them. Of equals the label that the
        submissions name first comes first; None where there are fewer than five.

    Raises:
        ValueError: not one weight a submission, no submission, or shapes that differ.
    """
    guesses = [np.asarray(part, dtype=object) for part in guesses]
    if len(guesses) != len(weights) or not guesses:
        raise ValueError(f"{len(guesses)} submissions, {len(weights)} weights")
    if len({part.shape for part in guesses}) > 1 or guesses[0].ndim != 2:
        raise ValueError(f"submissions of shapes {[part.shape for part in guesses]}")
    votes = np.array([part[:, : len(points)] for part in guesses], dtype=object)
    submission, row, rank = np.nonzero(~pd.isna(votes))
    worth = np.asarray(weights, dtype=float)[submission] * np.asarray(points, dtype=float)[rank]
    return _tally(row, votes[submission, row, rank], worth, votes.shape[1])[0]


def _tally(
    rows: np.ndarray, labels: np.ndarray, votes: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return each row's five labels with most votes, and these; of equals the one voted for first."""
    codes, names = pd.factorize(labels)
    key, first, place = np.unique(rows * len(names) + codes, return_index=True, return_inverse=True)
    total = np.bincount(place.ravel(), votes)
    row = key // max(len(names), 1)
    order = np.lexsort((first, -total, row))
    row = row[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < GUESSES
    guesses, scores = np.full((count, GUESSES), None, dtype=object), np.full((count, GUESSES), np.nan)
    guesses[row[kept], rank[kept]] = np.asarray(names, dtype=object)[key[order][kept] % max(len(names), 1)]
    scores[row[kept], rank[kept]] = total[order][kept]
    return guesses, scores


def hold_out(
    catalog: "Catalog", share: float = 0.1, new: float = 1.0, seed: int = 0
) -> tuple["Catalog", "Catalog"]:
    """Split labelled photographs into those to train on and those to choose a threshold with.

    Args:
        catalog: labelled.
        share: of the photographs of known whales to hold out: one each of as many whales as that makes,
            drawn among those with two or more, so that each held out has its whale among the rest.
        new: share of the ``new_whale`` photographs to hold out; a loss over identities has no use for them.
        seed: of the draw.

    Returns:
        The rest and the held out.
    """
    generator = np.random.default_rng([seed, len(catalog)])
    identity = catalog.table["identity"].reset_index(drop=True)
    known = identity[identity.notna() & (identity != NEW_WHALE)]
    shuffled = known.iloc[generator.permutation(len(known))]
    one_each = shuffled[known.map(known.value_counts())[shuffled.index] > 1].drop_duplicates()
    strangers = generator.permutation(np.flatnonzero(identity == NEW_WHALE))
    held = np.zeros(len(identity), dtype=bool)
    held[one_each.index[: round(share * len(known))]] = True
    held[strangers[: round(new * len(strangers))]] = True
    return catalog.where(~held), catalog.where(held)


def pair_split(
    catalog: "Catalog", pairs: int = 400, new_share: float = NEW_SHARE, seed: int = 508
) -> tuple["Catalog", "Catalog"]:
    """Split labelled photographs into those to train on and those to validate with, as the third solution does.

    It validates on whales with exactly two photographs, both of them: the first is trained on too, the second is not.
    The report has nothing on this split. On the contest's own photographs the draw is the solution's. Ours is what
    happens with fewer whales: at most half of those with two photographs are taken, so that the others stay in
    training with both; and where no whale has two, those with the next larger number take their place, of whom the
    last photograph alone is not trained on.

    Args:
        catalog: labelled; of two photographs the second is the one that its table lists last.
        pairs: whales to validate on.
        new_share: photographs of ``new_whale`` to validate on, as a share of the others; rounded down, and no more than
            there are.
        seed: of the draw.

    Returns:
        Photographs to train on, without ``new_whale``, and to validate with. The first photograph of each pair is in
        both; unlabelled ones are in neither.

    Raises:
        ValueError: nothing to hold out (pairs < 1, or fewer than two whales with equally many photographs, two or
            more), or new_share < 0.
    """
    table = catalog.table
    counts = table.loc[table["identity"] != NEW_WHALE, "identity"].value_counts()
    twos = sorted(counts.index[counts == counts[counts > 1].min()])
    pairs = min(pairs, len(twos) // 2)
    if pairs < 1:
        raise ValueError(
            f"nothing can be held out of {catalog.name}: {len(twos)} of its whales have the fewest photographs above "
            "one, and at most half of these are taken; two or more, and pairs from 1 up, are needed"
        )
    if not new_share >= 0:
        raise ValueError(f"new_share = {new_share}: give a share from 0 up")
    draw = random.Random(seed)  # Python's own: the solution's draw
    draw.shuffle(twos)
    strangers = sorted(table.loc[table["identity"] == NEW_WHALE, "image"])
    draw.shuffle(strangers)
    chosen = table["identity"].isin(twos[-pairs:])
    second = chosen & ~table["identity"].duplicated(keep="last")
    trained = table["identity"].notna() & (table["identity"] != NEW_WHALE) & ~second
    validated = chosen | table["image"].isin(strangers[: int(2 * pairs * new_share)])
    return catalog.where(trained.to_numpy(dtype=bool)), catalog.where(validated.to_numpy(dtype=bool))


def _nearest(similarity: np.ndarray, identities, count: int = GUESSES) -> tuple[np.ndarray, np.ndarray]:
    """Return the similarities (Q, k) float64 and places (Q, k) of each query's nearest k <= count identities."""
    similarity = np.asarray(similarity)
    if similarity.ndim != 2 or similarity.shape[1] != len(identities) or not len(identities):
        raise ValueError(f"similarity of shape {similarity.shape} for {len(identities)} identities")
    if NEW_WHALE in set(identities):
        raise ValueError(f"{NEW_WHALE} is no identity: the threshold places it")
    count = min(count, len(identities))
    place = np.empty((len(similarity), count), dtype=np.int64)
    nearest = np.empty((len(similarity), count))
    for start in range(0, len(similarity), 1024):
        chunk = np.array(similarity[start : start + 1024], dtype=np.result_type(similarity, np.float32))
        if not np.isfinite(chunk).all():
            raise ValueError(
                f"similarities that are not finite, among queries {start} to {start + len(chunk) - 1}"
            )
        rows = np.arange(len(chunk))
        for rank in range(count):  # argmax keeps the first of equals, a partial sort does not
            best = chunk.argmax(axis=1)
            place[start + rows, rank], nearest[start + rows, rank] = best, chunk[rows, best]
            chunk[rows, best] = -np.inf
    return nearest, place
