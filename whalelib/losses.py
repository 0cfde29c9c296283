"""What training lowers: the baseline's loss."""

import torch
import torch.nn.functional as F


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
