import itertools
import math
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from pytorch_metric_learning.miners import BatchHardMiner

from whalelib.losses import (
    aligned,
    euclidean,
    hardest,
    relations,
    shortest_path,
    stripe_costs,
    top_errors,
    triplet,
)

SET = os.environ.get("WHALE_REFERENCE", "")
ORACLES = sorted((Path(SET) / "oracle").glob("*.npz")) if SET else []
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
NEW = 10008


def unit(*shape, seed=0, dtype=torch.float64):
    rows = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=-1).to(dtype)


def close(found, expected, within=1e-9):
    torch.testing.assert_close(found, expected, rtol=0, atol=within)


# ---------------------------------------------------------------- one pair, one triplet, one class at a time


def naive_euclidean(rows):
    distance = [
        [max(math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))), 1e-6) for b in rows]
        for a in rows
    ]
    return torch.tensor(distance, dtype=torch.float64)


def naive_path(costs):
    """The least sum over every way there is, not step by step."""
    high, wide = len(costs), len(costs[0])
    sums = []
    for downs in itertools.combinations(range(high + wide - 2), high - 1):
        i = j = 0
        total = costs[0][0]
        for step in range(high + wide - 2):
            i, j = (i + 1, j) if step in downs else (i, j + 1)
            total += costs[i][j]
        sums.append(total)
    return min(sums)


def naive_aligned(stripes):
    def cost(a, b):
        e = math.exp(max(math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True))), 1e-6))
        return (e - 1) / (e + 1)

    images = stripes.tolist()
    rows = [[naive_path([[cost(s, t) for t in other] for s in one]) for other in images] for one in images]
    return torch.tensor(rows, dtype=torch.float64)


def naive_hardest(distance, labels, new):
    positives, negatives = [], []
    for a in range(len(labels)):
        positive, negative = distance[a][a], math.inf
        for b in range(len(labels)):
            if labels[a] != labels[b]:
                negative = min(negative, distance[a][b])
            elif labels[a] != new:
                positive = max(positive, distance[a][b])
        positives.append(positive)
        negatives.append(negative)
    return torch.tensor(positives, dtype=torch.float64), torch.tensor(negatives, dtype=torch.float64)


def naive_top_errors(logits, labels, top):
    first, second = [], []
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        chances = [1 / (1 + math.exp(-value)) for value in row]
        errors = sorted((abs((k == label) - chance) for k, chance in enumerate(chances)), reverse=True)
        first += [-math.log(1 - error) for error in errors[:top]]
        if label < len(row):
            second.append(-math.log(chances[label]))
    return sum(first) / len(first) + (sum(second) / len(second) if second else 0)


def test_against_loops():
    rows, stripes = unit(9, 5), unit(5, 4, 6)
    labels = torch.tensor([3, 3, NEW, 0, NEW, 0, 3, 7, 0])
    close(euclidean(rows), naive_euclidean(rows.tolist()))
    close(aligned(stripes), naive_aligned(stripes))
    distance = euclidean(rows)
    for found, expected in zip(
        hardest(distance, labels, NEW), naive_hardest(distance.tolist(), labels.tolist(), NEW), strict=True
    ):
        assert found.tolist() == expected.tolist()
    expected = sum(
        max(0, 0.3 + p - n)
        for p, n in zip(
            *(x.tolist() for x in naive_hardest(distance.tolist(), labels.tolist(), NEW)), strict=True
        )
    )
    assert triplet(distance, labels, NEW).item() == pytest.approx(expected / 9, abs=1e-12)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_the_shortest_path_is_the_least_of_all(high, wide, seed):
    # Few different costs, so that ties come up.
    costs = torch.randint(0, 4, (3, high, wide), generator=torch.Generator().manual_seed(seed)).double()
    assert shortest_path(costs).tolist() == [naive_path(matrix) for matrix in costs.tolist()]


def test_the_gradient_of_the_shortest_path_is_the_path():
    costs = torch.rand(6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    costs.requires_grad_()
    length = shortest_path(costs)
    (path,) = torch.autograd.grad(length, costs)
    assert set(path.flatten().tolist()) == {0.0, 1.0}
    assert path.sum() == 6 + 8 - 1 and path[0, 0] == path[-1, -1] == 1
    assert (path * costs).sum().item() == pytest.approx(length.item())


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=8),
    st.sampled_from([1, 3, 30]),
    st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_top_errors_against_a_loop(labels, top, seed):
    labels = torch.tensor(labels)
    logits = 3 * torch.randn(
        len(labels), 11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    assert top_errors(logits, labels, top).item() == pytest.approx(
        naive_top_errors(logits, labels, top), abs=1e-9
    )


# ---------------------------------------------------------------- the original functions


@pytest.fixture(scope="module")
def golden():
    if not SET:
        pytest.skip("WHALE_REFERENCE is not set: no values of the original functions to compare with")
    found = []
    for path in ORACLES:
        with np.load(path) as oracle:
            if any(name.startswith("first/") for name in oracle.files):
                found.append(
                    {
                        name: torch.from_numpy(oracle[name])
                        for name in oracle.files
                        if name.startswith("first/")
                    }
                )
    assert found, f"WHALE_REFERENCE={SET} holds no oracle/*.npz with values of the first solution"
    return found


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_first_solutions_values(golden, dtype):
    def same(value, key):
        assert value.dtype == dtype
        if f"first/{key}" in oracle:
            found = (value.double() - oracle[f"first/{key}"].double()).abs().max().item()
            assert found < TOLERANCE[dtype], f"{key}: {found:.1e} from the original"
            compared.add(key)

    compared, keys = set(), set()
    for oracle in golden:
        keys |= {key.removeprefix("first/") for key in oracle}
        labels = oracle.get("first/labels")
        for kind, distance in (("global", euclidean), ("local", aligned)):
            if f"first/{kind}_features" not in oracle:
                continue
            between = distance(oracle[f"first/{kind}_features"].to(dtype))
            positive, negative = hardest(between, labels, NEW)
            same(between, f"{kind}_distance_matrix")
            same(positive, f"{kind}_hardest_positive")
            same(negative, f"{kind}_hardest_negative")
            same(triplet(between, labels, NEW), f"{kind}_triplet")
        if "first/logits" in oracle:
            logits = oracle["first/logits"].to(dtype)
            same(top_errors(logits, labels), "sigmoid_loss_top30")
            same(top_errors(logits, torch.full_like(labels, NEW)), "sigmoid_loss_top30_all_new")
    given = {"global_features", "local_features", "labels", "logits"}
    assert keys - given == compared, "a value of the original that nothing is compared with"


# ---------------------------------------------------------------- edge cases


def parts(rows, stripes, logits, labels, new):
    return (
        triplet(euclidean(rows), labels, new),
        triplet(aligned(stripes), labels, new),
        top_errors(logits, labels),
    )


def whole(*arguments):
    return sum(parts(*arguments))


CASES = {
    "no positive": [0, 1, 2, 3],
    "no negative": [5, 5, 5, 5],
    "all new": [12, 12, 12, 12],
    "one known": [12, 12, 3, 12],
    "one row": [4],
    "one new row": [12],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alike", [False, True], ids=["different", "identical"])
@pytest.mark.parametrize("labels", CASES.values(), ids=CASES)
def test_values_and_gradients_are_finite(labels, alike, dtype):
    count = 1 if alike else len(labels)
    tensors = [unit(count, 6, dtype=dtype), unit(count, 3, 6, dtype=dtype), 3 * unit(count, 12, dtype=dtype)]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    expanded = [leaf.expand(len(labels), *leaf.shape[1:]) for leaf in leaves]
    losses = parts(*expanded, torch.tensor(labels), 12)
    sum(losses).backward()
    assert {loss.dtype for loss in losses} == {torch.promote_types(dtype, torch.float32)}
    assert all(loss.isfinite() for loss in losses)
    assert all(leaf.grad.isfinite().all() and leaf.grad.dtype == dtype for leaf in leaves)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [20.0, 100.0, 1000.0])
def test_saturated_logits(size, dtype):
    logits = torch.full((2, 50), -size, dtype=dtype)
    logits[0, :25] = size
    logits.requires_grad_()
    loss = top_errors(logits, torch.tensor([30, 3]))
    loss.backward()
    # The first row: 25 wrong classes and the true one missed, of 30; the second: the true one missed.
    assert loss.item() == pytest.approx(
        size * ((26 + 1) / 60 + 1), rel=5e-3 if dtype == torch.bfloat16 else 1e-6
    )
    assert logits.grad.isfinite().all()
    assert (logits.grad[0, :25] > 0).all() and logits.grad[0, 30] < 0 and logits.grad[1, 3] < 0


def test_a_row_without_positive_or_negative():
    distance = euclidean(unit(3, 4))
    for labels in ([1, 2, 3], [NEW, 2, NEW]):
        positive, negative = hardest(distance, torch.tensor(labels), NEW)
        assert positive.tolist() == [1e-6] * 3 and negative.isfinite().all()
    for label in (NEW, 1):
        rows = unit(3, 4).requires_grad_()
        distance = euclidean(rows)
        _, negative = hardest(distance, torch.full((3,), label), NEW)
        assert negative.tolist() == [math.inf] * 3
        loss = triplet(distance, torch.full((3,), label), NEW)
        loss.backward()
        assert loss == 0 and not rows.grad.any()


def test_new_whales_are_no_pair():
    positive, negative = relations(torch.tensor([5, NEW, 5, NEW]), NEW)
    assert positive.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
    assert negative.int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0]]


def test_a_collapsed_embedding_stays_where_it_is():
    rows = unit(1, 6, dtype=torch.float32).expand(4, 6).clone().requires_grad_()
    loss = triplet(euclidean(rows), torch.tensor([0, 0, 1, 1]), NEW)
    loss.backward()
    assert loss.item() == pytest.approx(0.3) and not rows.grad.any()


def test_an_image_is_not_at_0_from_itself_along_its_stripes():
    # The way needs 15 cells, of which only 8 lie on the diagonal.
    assert (aligned(unit(6, 8, 32)).diagonal() > 3).all()
    close(aligned(unit(6, 1, 32)).diagonal(), torch.full((6,), 5e-7, dtype=torch.float64), 1e-12)


def test_a_local_distance_forgives_a_shift():
    # Three of four stripes are the same animal's, one further down: stripe by stripe nothing fits.
    one, two = unit(2, 4, 512)
    shifted = torch.stack([two[0], *one[:3]])
    distance = aligned(torch.stack([one, shifted, two]))
    assert distance[0, 1] < distance[0, 2] - 1
    by_place = (torch.stack([shifted, two]) - one).norm(dim=-1).sum(dim=-1)
    assert by_place[0].item() == pytest.approx(by_place[1].item(), rel=0.1)


def test_float32_rows_keep_small_distances():
    rows = unit(1, 2048, dtype=torch.float32).repeat(2, 1)
    rows[1, 0] += 1e-4
    assert euclidean(rows)[0, 1].item() == pytest.approx(1e-4, rel=1e-2)
    assert euclidean(rows).diagonal().tolist() == [pytest.approx(1e-6)] * 2


def test_2_ln_2_untrained():
    labels = torch.tensor([0, 30, NEW])
    assert top_errors(torch.zeros(3, NEW), labels).item() == pytest.approx(2 * math.log(2))
    assert top_errors(torch.zeros(3, NEW), torch.full((3,), NEW)).item() == pytest.approx(math.log(2))


def test_only_the_top_errors_pull():
    logits = unit(2, 100).requires_grad_()
    top_errors(logits, torch.tensor([7, NEW]), top=30).backward()
    assert (logits.grad[1] > 0).sum() == 30 and (logits.grad[1] != 0).sum() == 30
    assert set(logits[1].topk(30).indices.tolist()) == set(logits.grad[1].nonzero().flatten().tolist())
    assert logits.grad[0, 7] < 0
    assert (logits.grad[0] != 0).sum() in (30, 31)


def test_a_label_that_no_class_has():
    with pytest.raises((IndexError, RuntimeError)):
        top_errors(torch.zeros(2, 10), torch.tensor([0, -1]))


# ---------------------------------------------------------------- properties


@given(st.lists(st.sampled_from([0, 1, 2, 8]), min_size=1, max_size=9), st.integers(0, 999))
@settings(deadline=None, max_examples=40)
def test_the_order_of_rows_does_not_matter(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    order = torch.randperm(count, generator=generator)
    labels = torch.tensor(labels)
    tensors = [unit(count, 5, seed=seed), unit(count, 3, 5, seed=seed), 3 * unit(count, 8, seed=seed)]
    for tensor in tensors:
        tensor.requires_grad_()
    loss = whole(*tensors, labels, 8)
    gradients = torch.autograd.grad(loss, tensors)
    permuted = whole(*(tensor[order] for tensor in tensors), labels[order], 8)
    assert permuted.item() == pytest.approx(loss.item())
    for one, two in zip(gradients, torch.autograd.grad(permuted, tensors), strict=True):
        close(two, one)


@given(st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_distances_are_distances(seed):
    rows, stripes = unit(7, 4, seed=seed), unit(6, 5, 7, seed=seed)
    for distance, most in ((euclidean(rows), 2), (aligned(stripes), 9)):
        close(distance, distance.T, 1e-12)
        assert (distance > 0).all() and (distance <= most).all()
    distance = euclidean(rows)
    assert (distance[:, None, :] <= distance[:, :, None] + distance[None, :, :] + 1e-5).all()
    costs = stripe_costs(stripes)
    assert costs.shape == (6, 6, 5, 5) and ((costs >= 0) & (costs < 1)).all()


def test_gradients_are_those_of_small_steps():
    labels = torch.tensor([0, 0, 1, 1, 8])
    tensors = [tensor.requires_grad_() for tensor in (unit(5, 4), unit(5, 3, 4), 3 * unit(5, 8))]
    assert torch.autograd.gradcheck(lambda *inputs: whole(*inputs, labels, 8), tensors)


# ---------------------------------------------------------------- another library


def test_batch_hard_as_in_pytorch_metric_learning():
    rows = unit(24, 16, dtype=torch.float32)
    labels = torch.arange(24) // 4
    mined = BatchHardMiner(distance=LpDistance(normalize_embeddings=False))(rows, labels)
    theirs = TripletMarginLoss(margin=0.3, distance=LpDistance(normalize_embeddings=False))(
        rows, labels, mined
    )
    # It averages over the rows whose loss is above 0; all are here.
    positive, negative = hardest(euclidean(rows), labels, NEW)
    assert (positive + 0.3 > negative).all()
    assert triplet(euclidean(rows), labels, NEW).item() == pytest.approx(theirs.item(), abs=1e-5)


def test_a_batch_of_the_contests_size_is_quick():
    stripes, labels = unit(48, 8, 512, dtype=torch.float32), torch.arange(48) % 12
    rows, logits = unit(48, 2048, dtype=torch.float32), torch.randn(48, NEW)
    leaves = [tensor.requires_grad_() for tensor in (rows, stripes, logits)]
    whole(*leaves, labels, NEW).backward()
    began = time.perf_counter()
    whole(*leaves, labels, NEW).backward()
    assert time.perf_counter() - began < 2  # pair by pair it takes a minute, this a tenth of a second
