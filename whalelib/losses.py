"""What training lowers: the baseline's loss, the first solution's three and the second's (sections 3.3.3, 4.3.3).

The first solution's loss is, of its network's output and the labels (2C for ``new_whale``)::

    triplet(euclidean(output["global"]), labels, 2 * C)
    + triplet(aligned(output["local"]), labels, 2 * C)
    + top_errors(output["logits"], labels)

The second solution's, of two heads' logits and cosines, and of the features that both begin with::

    focal(output["logits"], labels)
    + 0.1 * arcface(output["cosines"], labels)
    + triplet(euclidean(output["features"]), labels)
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CLOSEST = 1e-6  # the least distance between two rows: at 0 the root has no gradient


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Softmax cross entropy over the known identities, a mean over the rows that have one.

    Args:
        logits: (N, C).
        labels: (N,) indices of identities; rows with -1 (``new_whale``, or no label) are left out.
        smoothing: share of the target spread evenly over all C identities, 0 to 1 (label smoothing).

    Returns:
        A scalar, in nats. Zero, with gradients of zero, when every row is left out.
    """
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum", label_smoothing=smoothing)
    return total / (labels >= 0).sum().clamp(min=1)


def euclidean(rows: torch.Tensor) -> torch.Tensor:
    """Euclidean distance of every row to every row, not squared.

    Args:
        rows: (N, D); the first solution gives global features of length 1.

    Returns:
        (N, N), float64 for float64 rows, else float32. Distances below 1e-6, as those of a row to itself, are
        1e-6, with gradients of zero.
    """
    # Close rows are a small difference of large numbers, for which float32 is too coarse.
    product = rows.double() @ rows.double().T
    length = product.diagonal()
    squared = length[:, None] + length[None, :] - 2 * product
    return squared.clamp(min=CLOSEST**2).sqrt().to(_full(rows))


def stripe_costs(stripes: torch.Tensor) -> torch.Tensor:
    """Cost tanh(d / 2) of laying a stripe of one image upon a stripe of another, d being their distance.

    Args:
        stripes: (N, S, D), S stripes an image; the first solution gives stripes of length 1.

    Returns:
        (N, N, S, S), of 0 to 1: [a, b, i, j] is for stripe i of image a and stripe j of image b.

    Source: AlignedReID (Zhang et al., 2017), equation 1: (e^d - 1) / (e^d + 1).
    """
    images, count, _ = stripes.shape
    distance = euclidean(stripes.flatten(0, 1)).view(images, count, images, count)
    return (distance / 2).tanh().transpose(1, 2)


def shortest_path(costs: torch.Tensor) -> torch.Tensor:
    """Return the least sum of costs on a way from the first cell to the last, down or right at each step.

    Its gradient by the costs is the way itself: 1 on its cells, 0 elsewhere (a half on each side where two ways
    are equally cheap).

    Args:
        costs: (..., S, T).

    Returns:
        (...), sums of S + T - 1 costs.

    Source: AlignedReID (Zhang et al., 2017), equation 2.
    """
    above: list[torch.Tensor] = []
    for row in costs.unbind(-2):
        here: list[torch.Tensor] = []
        for j, cost in enumerate(row.unbind(-1)):
            before = [*above[j : j + 1], *here[-1:]]
            here.append(cost + torch.minimum(*before) if len(before) == 2 else sum(before, cost))
        above = here
    return above[-1]


def aligned(stripes: torch.Tensor) -> torch.Tensor:
    """Local distance of every image to every image: the shortest path through the costs of their stripes.

    The first solution's code; the report has "Euclidean distance" for it. An image's distance to itself is
    not 0, for the path can't stay on the diagonal.

    Args:
        stripes: (N, S, D), S stripes an image, of length 1.

    Returns:
        (N, N), float64 for float64 stripes, else float32.
    """
    return shortest_path(stripe_costs(stripes))


def relations(labels: torch.Tensor, new: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Say who is whose positive and who is whose negative.

    A row is its own positive, and of ``new_whale`` that is the only one. Two of ``new_whale`` may be the same
    whale or not: they are neither positive nor negative to each other.

    Args:
        labels: (N,) integers.
        new: the label of ``new_whale``; None where it is a class like the others, as in the second solution.

    Returns:
        Two (N, N) arrays of bool, positive and negative.

    Source: the solutions' code; the report doesn't say.
    """
    same = labels[:, None] == labels[None, :]
    known = torch.ones_like(labels, dtype=torch.bool) if new is None else labels != new
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & known | itself, ~same


def hardest(
    distance: torch.Tensor, labels: torch.Tensor, new: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each row to its farthest positive and its nearest negative in the batch.

    Args:
        distance: (N, N).
        labels: (N,) integers.
        new: the label of ``new_whale``; see ``relations`` for its rules.

    Returns:
        (N,) and (N,). Without another positive the first is the row's distance to itself; without a negative
        the second is infinite.

    Source: batch hard (Hermans et al., 2017); report, section 3.3.3.
    """
    positive, negative = relations(labels, new)
    return (
        distance.masked_fill(~positive, -torch.inf).amax(dim=1),
        distance.masked_fill(~negative, torch.inf).amin(dim=1),
    )


def hardest_as_shipped(distance: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the second solution's code takes for ``hardest``: wrong where classes differ in size.

    All positives' distances stand in one list, row after row, which is cut into N pieces of one length; likewise
    the negatives'. Where ``new_whale`` has more rows than a whale, the pieces aren't those of the rows, and a
    row gets another's farthest positive, which may be nearer than its own.

    Args:
        distance: (N, N).
        labels: (N,) integers, ``new_whale`` being a class like the others.

    Returns:
        (N,) and (N,), as ``hardest``, and the same when all classes have equally many rows.

    Raises:
        ValueError: N pieces of one length can't be had, which stops the original too.
    """
    positive, negative = relations(labels)
    each, rest = divmod(int(positive.sum()), len(labels))
    if rest:
        raise ValueError(
            f"{len(labels)} rows have {each * len(labels) + rest} positives, not equally many each on average: "
            "as shipped the second solution can't mine such a batch"
        )
    near = distance[positive].view(len(labels), each)
    far = distance[negative].view(len(labels), len(labels) - each)
    return near.amax(dim=1), F.pad(far, (0, 1), value=torch.inf).amin(dim=1)


def triplet(
    distance: torch.Tensor,
    labels: torch.Tensor,
    new: int | None = None,
    margin: float = 0.3,
    *,
    as_shipped: bool = False,
) -> torch.Tensor:
    """Batch-hard triplet loss: the mean over rows of max(0, margin + farthest positive - nearest negative).

    The solutions' code. The report's equation 3.6 is a sum over all triplets.

    Args:
        distance: (N, N), of ``euclidean`` or ``aligned``.
        labels: (N,) integers.
        new: the label of ``new_whale``, whose rows only push away the known whales nearest to them; None where it
            is a class like the others.
        margin: m in equation 3.6.
        as_shipped: take ``hardest_as_shipped``, for which ``new_whale`` is a class like the others.

    Returns:
        A scalar; 0 with gradients of zero when no row has a negative.
    """
    mined = hardest_as_shipped(distance, labels) if as_shipped else hardest(distance, labels, new)
    positive, negative = mined
    return F.relu(margin + positive - negative).mean()


def top_errors(logits: torch.Tensor, labels: torch.Tensor, top: int = 30) -> torch.Tensor:
    """Binary cross-entropy on each row's greatest errors, plus that of its true class.

    The first term is equation 3.7 on X = the ``top`` greatest of ``|one-hot - sigmoid(logits)|`` in each row
    and Y = 0. The second is equation 3.7 with target 1 on the true class's logit of each row that has one
    (the report's wording, "all entries set to 1", reads as if on all classes).

    Both are computed from the logits, so they stay exact, and keep their gradients, where the sigmoid is
    rounded to 0 or 1; the original's ``log`` is cut off at 100 there.

    Args:
        logits: (N, K), K = 2C: each known identity, then each of them flipped.
        labels: (N,), 0 to K - 1, or K and above for ``new_whale``, which has no logit of its own.
        top: how many errors of a row count; all K when there are fewer.

    Returns:
        A scalar, in nats; 2 ln 2 when all logits are 0.
    """
    logits = logits.to(_full(logits))
    known = labels < logits.shape[1]
    place = labels.clamp(max=logits.shape[1] - 1)[:, None]
    true = logits.gather(1, place)
    # -log(1 - error) is softplus of the logit, of the negated one for the true class, and rises with the error.
    signed = logits.scatter(1, place, torch.where(known[:, None], -true, true))
    wrong = F.softplus(signed.topk(min(top, signed.shape[1]), dim=1).values).mean()
    missed = F.softplus(-true[:, 0]).masked_fill(~known, 0).sum() / known.sum().clamp(min=1)
    return wrong + missed


class _Cosines(torch.autograd.Function):
    """Products of unit rows with weights, divided by the weights' lengths; no unit weights are ever held."""

    @staticmethod
    def forward(ctx, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        length = torch.linalg.vector_norm(weight, dim=1).clamp(min=1e-12)
        found = (rows @ weight.T).div_(length)
        ctx.save_for_backward(rows, weight, length, found)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        rows, weight, length, found = ctx.saved_tensors
        across = gradient / length
        for_rows = across @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return for_rows, None
        # A step along a weight changes its length alone, not the cosine: that part is taken away.
        along = (across * found).sum(dim=0) / length
        return for_rows, (weight * -along[:, None]).addmm_(across.T, rows)


def cosines(rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Cosine of the angle between every row and every class's direction.

    The same as the product of both after L2 normalisation, without a normalised copy of the weights, which for
    thousands of classes is most of such a head's memory and time. Under autocast it is computed in the weights'
    precision all the same: a scale of 64 and a margin leave nothing to round. Can be differentiated once.

    Args:
        rows: (N, D), of any length above 0.
        weight: (K, D), a direction a class, of any length above 0.

    Returns:
        (N, K) in the precision of ``weight``.

    Source: report, section 4.3.3: W and x normalised, no bias.
    """
    with torch.autocast(rows.device.type, enabled=False):
        return _Cosines.apply(F.normalize(rows.to(weight.dtype)), weight)


def add_margin(cosines: torch.Tensor, labels: torch.Tensor, margin: float = 0.5) -> torch.Tensor:
    """Make each row's own class harder by an angle: ArcFace's margin, or CosFace's where that would turn back.

    The own cosine, cos(t), becomes cos(t + m) where t + m < pi, and cos(t) - m sin(m) elsewhere: beyond pi
    a larger angle would have a larger cosine again.

    Args:
        cosines: (N, K), not scaled; they may be outside [-1, 1] by rounding.
        labels: (N,) integers; a row whose label is not one of 0 to K - 1 (``new_whale``) is left as it is.
        margin: m, in radians.

    Returns:
        (N, K), float64 for float64 cosines, else float32. Gradients are finite everywhere; at an angle of 0 or
        pi, where the slope is infinite, only the cosine's own part counts.

    Source: report, equation 4.8 and the CosFace section; ArcFace (Deng et al., 2019). The report has the switch
    at t outside [0, pi], where t never is; the code at t + m.
    """
    known, place = _own(labels, cosines.shape[1])
    own = cosines.gather(1, place).to(_full(cosines))
    sine = ((1 - own) * (1 + own)).clamp(min=torch.finfo(own.dtype).tiny).sqrt()
    turned = own * math.cos(margin) - sine * math.sin(margin)
    moved = torch.where(own > -math.cos(margin), turned, own - margin * math.sin(margin))
    changed = cosines.to(own.dtype, copy=True)
    return changed.scatter_(1, place, torch.where(known[:, None], moved, own))


def without_mirrored(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Let each row's own whale, mirrored, push nobody: the third solution's rule, of which the report is silent.

    The logit of the mirrored class is taken for a constant, 1 above what it would be among logits that start from 0:
    as shipped all others fall by 1 and it is set to 0. It has no gradient.

    Args:
        logits: (N, 2C): each known whale, then each of them mirrored.
        labels: (N,) integers from 0 to 2C - 1.

    Returns:
        (N, 2C).
    """
    whales = logits.shape[1] // 2
    return (logits - 1).scatter(1, ((labels + whales) % (2 * whales))[:, None], 0.0)


def arcface(
    cosines: torch.Tensor, labels: torch.Tensor, margin: float = 0.5, scale: float = 64.0
) -> torch.Tensor:
    """Softmax cross entropy of scaled cosines with a margin for the true class, a mean over the rows that have one.

    The report has the margin; the second solution's code never applies it in training: margin 0 (NormFace).

    Args:
        cosines: (N, K), as ``cosines`` gives.
        labels: (N,) integers; rows whose label is not one of 0 to K - 1 (``new_whale``) are left out.
        margin: m in equation 4.8, radians.
        scale: s in equation 4.8.

    Returns:
        A scalar, in nats. Zero, with gradients of zero, when every row is left out.

    Source: report, equation 4.8.
    """
    known, _ = _own(labels, cosines.shape[1])
    logits = add_margin(cosines, labels, margin).mul_(scale)
    return cross_entropy(logits, labels.masked_fill(~known, -1))


def focal(
    logits: torch.Tensor, labels: torch.Tensor, ratio: float | None = None, gamma: float = 2.0
) -> torch.Tensor:
    """Adapted focal loss: binary cross-entropy of every class, and the same again weighted by its error.

    With X* = -X for the true class and X for the others, an entry's cross-entropy is log(1 + exp(X*)), which is
    equation 4.12's h(X*) + zeta(-|X*|) with h(x) = max(x, 0). (Equation 4.9 has h's sign wrong: |x| where
    x <= 0.) Its error is sigma(X*).

    Args:
        logits: (N, K).
        labels: (N,) integers; a row whose label is not one of 0 to K - 1 (``new_whale``) has no true class.
        ratio: None, the report: both terms are means over all entries. Otherwise the code: both are means over the
            int(ratio * K), but at least one, hardest entries of each row, and a third term is the weighted
            cross-entropy of the true class, a mean over the rows that have one.
        gamma: power of the error.

    Returns:
        A scalar, in nats.

    Raises:
        ValueError: a ratio not above 0 or above 1.

    Source: report, equations 4.9 to 4.12; focal loss (Lin et al., 2017).
    """
    if ratio is not None and not 0 < ratio <= 1:
        raise ValueError(f"ratio = {ratio}: give a share of the classes, above 0 and at most 1")
    logits = logits.to(_full(logits))
    known, place = _own(labels, logits.shape[1])
    true = logits.gather(1, place)
    signed = logits.scatter(1, place, torch.where(known[:, None], -true, true))
    if ratio is None:
        return _focal_entries(signed, gamma).mean()
    # Both terms rise with X*, so they have the same hardest entries.
    hard = signed.topk(max(1, int(ratio * logits.shape[1])), dim=1).values
    missed = -true[:, 0]
    third = (missed.sigmoid() ** gamma * F.softplus(missed)).masked_fill(~known, 0)
    return _focal_entries(hard, gamma).mean() + third.sum() / known.sum().clamp(min=1)


def _focal_entries(signed: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return each entry's cross-entropy plus its weighted one, of X*."""
    return (1 + signed.sigmoid() ** gamma) * F.softplus(signed)


def _own(labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which rows have one of the classes, (N,), and each row's place for ``gather``, (N, 1); 0 without."""
    known = (labels >= 0) & (labels < classes)
    return known, labels.masked_fill(~known, 0)[:, None]


def _full(tensor: torch.Tensor) -> torch.dtype:
    """Return the precision of a result: that of the argument, but at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
