"""Time and memory of ArcFace, forward and backward, at the second solution's size: ours, one-hot, another library.

    python tests/arcface_speed.py

prints JSON: for each its loss, the least processor seconds of three runs in turn, and the highest memory above what
was held before (MB; null where the system doesn't tell).
"""

import json
import math
import time
from pathlib import Path

import torch
from pytorch_metric_learning.losses import ArcFaceLoss

from whalelib.bench import one_hot_arcface
from whalelib.losses import arcface, cosines

BATCH, CLASSES, FEATURES = 64, 10008, 2048
MARGIN, SCALE = 0.5, 64.0
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak(run) -> float | None:
    """Return the highest memory while a function runs, above what was held before, in MB."""
    try:
        RESET.write_text("5")  # Linux: the highest resident size begins anew
    except OSError:
        return None
    before = resident("VmRSS")
    run()
    return round((resident("VmHWM") - before) / 1024, 1)


def resident(name: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(name))


def compare() -> dict[str, dict[str, float | None]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(BATCH, FEATURES, generator=generator).requires_grad_()
    weight = torch.randn(CLASSES, FEATURES, generator=generator).requires_grad_()
    labels = torch.randint(CLASSES, (BATCH,), generator=generator)
    library = ArcFaceLoss(CLASSES, FEATURES, margin=math.degrees(MARGIN), scale=SCALE)
    library.W.data = weight.detach().T.contiguous()
    losses = {
        "ours": lambda: arcface(cosines(rows, weight), labels, MARGIN, SCALE),
        "one-hot": lambda: one_hot_arcface(rows, weight, labels),
        "pytorch-metric-learning": lambda: library(rows, labels),
    }

    def step(name: str) -> float:
        loss = losses[name]()
        loss.backward()
        rows.grad = weight.grad = library.W.grad = None
        return loss.item()

    found = {name: {"loss": step(name), "seconds": math.inf} for name in losses}
    for _ in range(3):
        for name, row in found.items():
            began = time.process_time()
            step(name)
            row["seconds"] = min(row["seconds"], round(time.process_time() - began, 4))
    for name, row in found.items():
        row["megabytes"] = peak(lambda name=name: step(name))
    return found


if __name__ == "__main__":
    print(json.dumps(compare()))
