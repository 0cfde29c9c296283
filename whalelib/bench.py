"""How fast are the parts at full size? `python -m whalelib.bench step` and `python -m whalelib.bench loader`.

Pixels are random, and so are weights: time and memory depend on neither. Every row says on what it was measured, and
what share it is of the same machine's matrix products, measured in the same run.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from whalelib import augment
from whalelib.data.photographs import as_tensor, transformed
from whalelib.models import SECOND_PLACE_BACKBONES
from whalelib.recipes import first, second, third
from whalelib.train import keep_memory

WHALES = 5004
PEAK_SIDE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
# The published sizes and batches: which recipe, which backbone of it, channels, (H, W), images.
NETWORKS = {
    "senet154": ("first", None, 4, first.SIZES["paper"], 4 * first.BATCH["paper"]),
    **{
        name: ("second", name, 3, second.SIZES["paper"][0], second.BATCH["paper"])
        for name in SECOND_PLACE_BACKBONES
    },
    "densenet121": ("third", None, 3, third.SIZES["paper"], third.BATCH["paper"]),
}


def paper_network(name: str) -> tuple[nn.Module, Callable, Callable]:
    """Return one of NETWORKS as the `paper` profile has it, its loss, and what makes its optimizer."""
    recipe, backbone = NETWORKS[name][:2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights will do
        if recipe == "first":
            return first.network("paper", WHALES, "as_described", 0), first.loss, first.optimizer
        if recipe == "second":
            network = second.network("paper", WHALES, "as_described", 0, backbone)
            return network, second.Loss("as_described", 100, second.MARGIN["as_described"]), second.optimizer
        return third.network("paper", WHALES, 0), third.loss, third.optimizer


def paper_batch(name: str, images: int, device: str) -> dict[str, torch.Tensor]:
    """Return random images and labels as the network is trained on: pairs, and for the first two some new whales."""
    recipe, _, channels, size, _ = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(WHALES, (images,), generator=generator)
    labels[1::2] = labels[::2][: len(labels[1::2])]
    if recipe != "third":
        labels[3::4] = 2 * WHALES
    pixels = torch.rand(images, channels, *size, generator=generator)
    return {"image": pixels.to(device), "label": labels.to(device)}


def training_step(
    name: str,
    images: int | None = None,
    *,
    device: str = "cpu",
    bf16: bool = False,
    channels_last: bool = False,
    compiled: bool = False,
    seconds: float = 5.0,
) -> dict[str, object]:
    """Time training steps of a full-size network on a batch that is on the device already.

    Args:
        name: one of NETWORKS.
        images: a batch; default the published one.
        device: "cpu" or "cuda".
        bf16: under autocast.
        channels_last: layout of weights and images.
        compiled: by torch.compile; what that takes is not in the time.
        seconds: to go on for, after three steps to warm up; at least two steps.

    Returns:
        A row: the arguments, ``images a second``, ``TFLOP/s`` of the backbone's and the heads' products, ``GiB`` at the
        peak (CUDA only), and the last ``loss``.
    """
    keep_memory()
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, loss, optimizer = paper_network(name)
    model = model.to(device, memory_format=layout).train()
    learner = optimizer(model)
    images = images or NETWORKS[name][4]
    batch = paper_batch(name, images, device)
    batch["image"] = batch["image"].to(memory_format=layout)
    run = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            output = run(batch["image"])
        value = loss({key: found.float() for key, found in output.items()}, batch)["loss"]
        value.backward()
        learner.step()
        learner.zero_grad()
        return value.detach()

    counter = FlopCounterMode(display=False)
    with counter, torch.autocast(device, torch.bfloat16, enabled=bf16):
        found = model(batch["image"])
        sum(value.float().square().mean() for value in found.values()).backward()
    learner.zero_grad()
    del found
    for _ in range(3):
        value = step()
    _wait(device)
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < seconds:
        value = step()
        _wait(device)
        steps += 1
    rate = steps * images / (time.perf_counter() - began)
    row = {"network": name, "images": images, "device": _device_name(device), "bf16": bf16}
    row |= {"channels_last": channels_last, "compiled": compiled, "images a second": rate}
    row |= {"TFLOP/s": counter.get_total_flops() * rate / images / 1e12, "loss": value.item()}
    if device == "cuda":
        row["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
    return row


def matrix_peak(device: str = "cpu", bf16: bool = False, seconds: float = 1.0) -> float:
    """Return the TFLOP/s of a large square matrix product, the best of several."""
    side = PEAK_SIDE[device]
    kind = torch.bfloat16 if bf16 else torch.float32
    one, other = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    one @ other
    _wait(device)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        one @ other
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e12


class _Augmented(Dataset):
    """Random photographs in memory that a pipeline changes: all that a training's workers do but reading files."""

    def __init__(self, transform, size: tuple[int, int], channels: int, count: int = 256):
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randint(
            256, (16, *size, channels), generator=generator, dtype=torch.uint8
        ).numpy()
        self.transform, self.count = transform, count

    def __len__(self):
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return as_tensor(transformed(self.transform, (0, 0, index), self.pixels[index % len(self.pixels)]))


def loader(name: str, workers: int, images: int = 2048) -> dict[str, object]:
    """Return how many images a second so many processes augment for a network, and bring to the one that trains."""
    recipe, _, channels, size, batch = NETWORKS[name]
    transform = getattr(augment, f"{recipe}_place")(size)
    data = _Augmented(transform, size, channels, images)
    batches = DataLoader(data, batch_size=batch, num_workers=workers, prefetch_factor=4 if workers else None)
    return {"network": name, "workers": workers, "images a second": _rate(batches)}


def _rate(batches: Iterable[torch.Tensor]) -> float:
    # What starting the processes takes is not in the time.
    places = iter(batches)
    next(places)
    began, seen = time.perf_counter(), 0
    for batch in places:
        seen += len(batch)
    return seen / (time.perf_counter() - began)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _device_name(device: str) -> str:
    return (
        f"cuda ({torch.cuda.get_device_name()})"
        if device == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print a line of JSON for each."""
    parser = argparse.ArgumentParser(prog="python -m whalelib.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("step", "loader"))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS), metavar="NAME")
    parser.add_argument("--images", type=int, nargs="+", default=[0], help="a batch; 0 is the published one")
    parser.add_argument(
        "--variants", nargs="+", default=["plain"], help="plain, or bf16, last, compile, joined by +"
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="a measurement")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu"
    )
    chosen = parser.parse_args(arguments)
    tell = partial(print, flush=True)
    if chosen.what == "loader":
        for name in chosen.networks:
            for workers in chosen.workers:
                tell(json.dumps(loader(name, workers)))
        return 0
    peak = {bf16: matrix_peak(chosen.device, bf16) for bf16 in (False, True)}
    tell(json.dumps({"matrix product, TFLOP/s": {"float32": peak[False], "bf16": peak[True]}}))
    for name in chosen.networks:
        for images in chosen.images:
            for variant in chosen.variants:
                parts = variant.split("+")
                options = {
                    "bf16": "bf16" in parts,
                    "channels_last": "last" in parts,
                    "compiled": "compile" in parts,
                }
                row = training_step(
                    name, images or None, device=chosen.device, seconds=chosen.seconds, **options
                )
                tell(json.dumps(row | {"share of peak": row["TFLOP/s"] / peak[options["bf16"]]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
