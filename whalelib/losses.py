"""What training lowers: the baseline's loss, and the first solution's three (report, section 3.3.3).

The first solution's loss is, of its network's output and the labels (2C for ``new_whale``)::

    triplet(euclidean(output["global"]), labels, 2 * C)
    + triplet(aligned(output["local"]), labels, 2 * C)
    + top_errors(output["logits"], labels)
"""

import torch
import torch.nn.functional as F

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


def relations(labels: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Say who is whose positive and who is whose negative.

    A row is its own positive, and of ``new_whale`` that is the only one. Two of ``new_whale`` may be the same
    whale or not: they are neither positive nor negative to each other.

    Args:
        labels: (N,) integers.
        new: the label of ``new_whale``.

    Returns:
        Two (N, N) arrays of bool, positive and negative.

    Source: the first solution's code; the report doesn't say.
    """
    same = labels[:, None] == labels[None, :]
    known = labels != new
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & known | itself, ~same


def hardest(distance: torch.Tensor, labels: torch.Tensor, new: int) -> tuple[torch.Tensor, torch.Tensor]:
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


def triplet(distance: torch.Tensor, labels: torch.Tensor, new: int, margin: float = 0.3) -> torch.Tensor:
    """Batch-hard triplet loss: the mean over rows of max(0, margin + farthest positive - nearest negative).

    The first solution's code. The report's equation 3.6 is a sum over all triplets.

    Args:
        distance: (N, N), of ``euclidean`` or ``aligned``.
        labels: (N,) integers.
        new: the label of ``new_whale``, whose rows only push away the known whales nearest to them.
        margin: m in equation 3.6.

    Returns:
        A scalar; 0 with gradients of zero when no row has a negative.
    """
    positive, negative = hardest(distance, labels, new)
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


def _full(tensor: torch.Tensor) -> torch.dtype:
    """Return the precision of a result: that of the argument, but at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)
