"""How fast are the parts? `make bench` measures them all and keeps a table of each in `data/bench/`.

`python -m whalelib.bench step` and `loader` do so for the published sizes, on a GPU where there is one. Pixels and
weights are random: time and memory depend on neither. What is compared is measured in turn in one run, and every row
says on what machine.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import random
import re
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from albumentations import BaseCompose
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from whalelib import augment, losses
from whalelib.data import open_catalog
from whalelib.data.batches import PxK, Shuffled
from whalelib.data.photographs import as_tensor, transformed
from whalelib.data.statistics import photograph_statistics
from whalelib.files import locked, replacing
from whalelib.identify import nearest, template_similarity, top5
from whalelib.ledger import project_root
from whalelib.models import SECOND_PLACE_BACKBONES
from whalelib.recipes import baseline, first, second, third
from whalelib.run import EDITIONS, place
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
    "densenet121": ("third", None, 3, third.SIZES["paper"], third.BATCH),
}
# The same of the lab, whose networks are of one backbone.
LAB = {
    "lab: baseline": ("baseline", None, 3, baseline.SIZES["lab"], 32),
    "lab: first": ("first", None, 4, first.SIZES["lab"], 4 * first.BATCH["lab"]),
    "lab: second": ("second", None, 3, second.SIZES["lab"][0], second.BATCH["lab"]),
    "lab: third": ("third", None, 3, third.SIZES["lab"], third.BATCH),
}


def network(name: str) -> tuple[nn.Module, Callable, Callable]:
    """Return one of NETWORKS, as the `paper` profile has it, or of LAB; its loss, and what makes its optimizer."""
    recipe, backbone = (NETWORKS | LAB)[name][:2]
    profile = "lab" if name in LAB else "paper"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights will do
        if recipe == "baseline":
            found = baseline.network(WHALES, 0)
            return found, lambda *both: {"loss": baseline.loss(*both)}, baseline.optimizer
        if recipe == "first":
            return first.network(profile, WHALES, "as_described", 0), first.loss, first.optimizer
        if recipe == "second":
            found = second.network(profile, WHALES, "as_described", 0, backbone)
            return found, second.Loss("as_described", 100, second.MARGIN["as_described"]), second.optimizer
        return third.network(profile, WHALES, 0), third.loss, third.optimizer


def batch_for(name: str, images: int, device: str) -> dict[str, torch.Tensor]:
    """Return random images and labels as the network is trained on: pairs, and for the first two some new whales."""
    recipe, _, channels, size, _ = (NETWORKS | LAB)[name]
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(WHALES, (images,), generator=generator)
    labels[1::2] = labels[::2][: len(labels[1::2])]
    if recipe in ("first", "second"):
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
    """Time training steps of a network on a batch that is on the device already.

    Args:
        name: one of NETWORKS or LAB.
        images: a batch; default the published one.
        device: "cpu" or "cuda".
        bf16: under autocast.
        channels_last: layout of weights and images.
        compiled: by torch.compile; what that takes is not in the time.
        seconds: to go on for, after three steps to warm up; at least two steps.

    Returns:
        A row: the arguments, ``images a second``, ``TFLOP/s`` (products of forward pass, times three), ``GiB`` at the
        peak (CUDA only), and the last ``loss``.
    """
    keep_memory()
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model, loss, optimizer = network(name)
    model = model.to(device, memory_format=layout).train()
    learner = optimizer(model)
    images = images or (NETWORKS | LAB)[name][4]
    batch = batch_for(name, images, device)
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

    # A step has three times the forward pass' products. Counted backward, those of grouped convolutions would be too
    # many: torch's counter takes their weights' gradients for those of whole ones.
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        model(batch["image"])
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
    row |= {"TFLOP/s": 3 * counter.get_total_flops() * rate / images / 1e12, "loss": value.item()}
    if device == "cuda":
        row["GiB"] = peak_memory(device)
        torch.cuda.reset_peak_memory_stats()
    return row


def peak_memory(device: str) -> float:
    """Return the most memory, GiB, that this process had on a CPU, or that torch held on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    # Linux counts into a process's ru_maxrss what the one that started it had.
    if found := re.search(r"^VmHWM:\s+(\d+) kB", _text("/proc/self/status"), re.M):
        return int(found[1]) / 2**20
    unit = 2**10 if sys.platform == "darwin" else 1  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit / 2**20


def matrix_peak(device: str = "cpu", bf16: bool = False, seconds: float = 1.0) -> float:
    """Return the TFLOP/s of a large square matrix product, the best of several.

    In float32 a GPU's convolutions multiply in TF32, unless told otherwise, and so does this product.
    """
    side, precision = PEAK_SIDE[device], torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
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
    torch.set_float32_matmul_precision(precision)
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


def loader(name: str, workers: int, rounds: int = 20) -> dict[str, object]:
    """Return how many images a second so many processes augment for a network, and bring to the one that trains.

    rounds: batches of each process, after the first.
    """
    recipe, *_, batch = NETWORKS[name]
    _, size, channels = PIPELINES[recipe]
    transform, a_round = getattr(augment, f"{recipe}_place")(size), max(workers, 1)
    data = _Augmented(transform, size, channels, batch * a_round * (rounds + 1))
    batches = DataLoader(data, batch_size=batch, num_workers=workers, prefetch_factor=4 if workers else None)
    return {"network": name, "workers": workers, "images a second": _rate(batches, a_round)}


def _rate(batches: Iterable[torch.Tensor], first: int) -> float:
    # What starting the processes takes is not in the time, nor the first batches, which come at once.
    places = iter(batches)
    for _ in range(first):
        next(places)
    began, seen = time.perf_counter(), 0
    for batch in places:
        seen += len(batch)
    return seen / (time.perf_counter() - began)


# ---- make bench

# The table, (H, W) of what it is used on and its channels. The third solution crops afterwards.
PIPELINES = {
    "first": (augment.FIRST_PLACE, first.SIZES["paper"], 4),
    "second": (augment.SECOND_PLACE, second.SIZES["paper"][0], 3),
    "third": (augment.THIRD_PLACE, third.FRAMES["paper"], 3),
}


def augmentations(seconds: float = 1.0) -> list[dict[str, object]]:
    """Return how many images a second one core augments with each table, and what each of its steps takes.

    ``milliseconds`` of a step are an image's when it is taken; ``on average``, times its probability.
    """
    rows = []
    for recipe, (table, size, channels) in PIPELINES.items():
        pixels = np.random.default_rng(0).integers(0, 256, (*size, channels), dtype=np.uint8)
        parts = {"image": np.ascontiguousarray(pixels[..., :3])}
        parts |= {"mask": np.ascontiguousarray(pixels[..., 3])} if channels == 4 else {}
        for edition in EDITIONS:
            whole = getattr(augment, f"{recipe}_place")(size, edition)
            about = {"recipe": recipe, "edition": edition, "size": f"{size[0]} x {size[1]}"}
            draws = iter(range(10**9))
            took = _least(lambda w=whole, d=draws, p=pixels: transformed(w, (0, next(d)), p), seconds)
            row = {"step": "all of them", "milliseconds": 1e3 * took, "on average": 1e3 * took}
            rows.append(about | row | {"images a second": 1 / took})
            there = [step for step in table if getattr(step, edition.removeprefix("as_")) is not None]
            for step, leaf in zip(there, _leaves(whole), strict=True):
                leaf.set_random_state(np.random.default_rng(0), random.Random(0))
                took = 1e3 * _least(lambda t=leaf, p=parts: t(**p, force_apply=True), seconds / 5)
                row = {"step": step.name, "milliseconds": took, "on average": step.probability * took}
                rows.append(about | row)
    return rows


def _leaves(pipeline: BaseCompose) -> Iterator:
    for step in pipeline.transforms:
        if isinstance(step, BaseCompose):
            yield from _leaves(step)
        else:
            yield step


def loss_times(
    seconds: float = 1.0, rows: int = 64, classes: int = 10_008, features: int = 2048
) -> list[dict]:
    """Return what a loss takes, forward and backward: ours, as it is usually written, and pytorch-metric-learning's."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(rows // 4).repeat_interleave(4)
    vectors = F.normalize(torch.randn(rows, features, generator=generator)).requires_grad_()
    weight = torch.randn(classes, features, generator=generator).requires_grad_()
    stripes = F.normalize(torch.randn(rows // 4, 8, 128, generator=generator), dim=2).requires_grad_()
    logits = torch.randn(rows, classes, generator=generator).requires_grad_()
    cases: dict[str, dict[str, Callable[[], torch.Tensor]]] = {
        "ArcFace": {
            "ours": lambda: losses.arcface(losses.cosines(vectors, weight), labels),
            "plain": lambda: one_hot_arcface(vectors, weight, labels),
        },
        "batch-hard triplet": {
            "ours": lambda: losses.triplet(losses.euclidean(vectors), labels),
            "plain": lambda: looped_triplet(vectors, labels),
        },
        "aligned distance": {
            "ours": lambda: losses.aligned(stripes).sum(),
            "plain": lambda: looped_aligned(stripes),
        },
        "focal, all classes": {
            "ours": lambda: losses.focal(logits, labels),
            "plain": lambda: one_hot_focal(logits, labels),
        },
    }
    if importlib.util.find_spec("pytorch_metric_learning"):
        from pytorch_metric_learning import losses as theirs  # noqa: PLC0415
        from pytorch_metric_learning import miners  # noqa: PLC0415

        arc = theirs.ArcFaceLoss(classes, features, margin=math.degrees(0.5), scale=64)
        arc.W.data = weight.detach().T.contiguous()
        mine, triplet = miners.BatchHardMiner(), theirs.TripletMarginLoss(margin=0.3)
        cases["ArcFace"]["pytorch-metric-learning"] = lambda: arc(vectors, labels)
        cases["batch-hard triplet"]["pytorch-metric-learning"] = lambda: triplet(
            vectors, labels, mine(vectors, labels)
        )
    found = []
    for loss, ways in cases.items():
        took = _in_turn({way: lambda f=function: f().backward() for way, function in ways.items()}, seconds)
        for way, function in ways.items():
            row = {"loss": loss, "way": way, "milliseconds": 1e3 * took[way], "value": function().item()}
            found.append(row | {"times ours": took[way] / took["ours"]})
    return found


def one_hot_arcface(vectors: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return ArcFace's loss as it is usually written: every class's cosine moved, a one-hot mask chooses."""
    cosine = F.linear(F.normalize(vectors), F.normalize(weight))
    sine = (1 - cosine**2).clamp(1e-9, 1).sqrt()
    turned = cosine * math.cos(0.5) - sine * math.sin(0.5)
    moved = torch.where(cosine > -math.cos(0.5), turned, cosine - 0.5 * math.sin(0.5))
    mask = torch.zeros_like(cosine).scatter_(1, labels[:, None], 1)
    return F.cross_entropy(64 * (mask * moved + (1 - mask) * cosine), labels)


def looped_triplet(vectors: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the batch-hard triplet loss, a row at a time."""
    total = vectors.new_zeros(())
    for row, label in zip(vectors, labels, strict=True):
        distance = (row - vectors).square().sum(1).clamp(min=1e-12).sqrt()
        total = total + F.relu(0.3 + distance[labels == label].max() - distance[labels != label].min())
    return total / len(labels)


def looped_aligned(stripes: torch.Tensor) -> torch.Tensor:
    """Return the sum of the aligned distances, a pair of images at a time."""
    total = stripes.new_zeros(())
    for one in stripes:
        for other in stripes:
            costs = (torch.cdist(one, other) / 2).tanh()
            total = total + losses.shortest_path(costs)
    return total


def one_hot_focal(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the adapted focal loss by sigmoids, logarithms and a one-hot matrix."""
    target = F.one_hot(labels, logits.shape[1]).float()
    chance = logits.sigmoid()
    error = (target - chance).abs()
    entropy = -(target * chance.clamp(min=1e-12).log() + (1 - target) * (1 - chance).clamp(min=1e-12).log())
    return ((1 + error**2) * entropy).mean()


def samplers(seconds: float = 1.0, photographs: int = 25_361, whales: int = 5_004) -> list[dict[str, object]]:
    """Return what dealing out an epoch of the contest's size takes."""
    rng = np.random.default_rng(0)
    labels = np.concatenate([np.arange(whales), rng.integers(0, whales + 1, photographs - whales)])
    grouped, plain = PxK(labels, 64, whales), Shuffled(photographs, 64)
    rows = []
    for name, sampler in (("PxK, 16 x 4", grouped), ("shuffled", plain)):
        took = _least(lambda s=sampler: (s.set_epoch(1), list(s)), seconds)
        rows.append({"sampler": name, "batches": len(list(sampler)), "milliseconds an epoch": 1e3 * took})
    return rows


def catalog_times(data: str = "world") -> list[dict[str, object]]:
    """Return what opening a catalog, checking it and reading its photographs' statistics take, nothing being kept."""
    catalog, opening = _timed(lambda: open_catalog(data))
    checked, checking = _timed(catalog.verified)
    paths = checked.table["path"].tolist()[:256]
    _, reading = _timed(lambda: [photograph_statistics(path) for path in paths])
    count_of = {"opening": (len(catalog), opening), "checking": (len(catalog), checking)}
    count_of |= {"statistics of each photograph": (len(paths), reading)}
    return [
        {"what": what, "photographs": number, "seconds": took, "photographs a second": number / took}
        for what, (number, took) in count_of.items()
    ]


def retrieval(large: int = 1_000_000) -> list[dict[str, object]]:
    """Return what the five nearest of a gallery take: ours, sorted by NumPy, and by faiss (its exact search).

    At the contest's size, with five guesses a query; and for some queries in a gallery of a million. And all that the
    third solution compares, see :func:`twelve_views`.
    """
    rows = []
    for queries, gallery in ((7_960, 10_008), (256, large)):
        generator = torch.Generator().manual_seed(0)
        asked, known = (
            F.normalize(torch.randn(count, 512, generator=generator)).numpy() for count in (queries, gallery)
        )
        ways = {"ours": lambda a=asked, k=known: nearest(a, k, faiss=False)}
        if gallery < 100_000:
            names = np.arange(gallery).astype(str)
            ways["ours, whole matrix and guesses"] = lambda a=asked, k=known, n=names: top5(
                template_similarity(a, k), n, 0.385
            )
            ways["sorted by NumPy"] = lambda a=asked, k=known: np.argsort(-(a @ k.T), axis=1)[:, :5]
        if importlib.util.find_spec("faiss"):
            import faiss  # noqa: PLC0415

            index = faiss.IndexFlatIP(512)
            index.add(known)
            ways["faiss, IndexFlatIP"] = lambda a=asked, i=index: i.search(a, 5)
            ways["ours, by faiss"] = lambda a=asked, k=known: nearest(a, k, faiss=True)
        for way, function in ways.items():
            took = min(_timed(function)[1] for _ in range(1 if "NumPy" in way else 2))
            rows.append({"queries": queries, "gallery": gallery, "way": way, "seconds": took})
    return [*rows, _apart("twelve_views()")]


def twelve_views(queries: int = 7_960, gallery: int = 10_008) -> dict[str, object]:
    """Return what the third solution's comparison takes at the contest's size: three networks, four views of each.

    Seconds and GB (1e9 bytes) at the peak, features and all. For a process of its own, whose memory it is.
    """
    generator = torch.Generator().manual_seed(0)
    asked, known = (
        F.normalize(torch.randn(12, count, 512, generator=generator), dim=2).numpy()
        for count in (queries, gallery)
    )
    names = np.arange(gallery).astype(str)
    began = time.process_time()
    _, took = _timed(lambda: top5(template_similarity(asked, known), names, 0.385))
    row = {
        "queries": queries,
        "gallery": gallery,
        "way": "the third solution's twelve views",
        "seconds": took,
    }
    return row | {"processor seconds": time.process_time() - began, "GB": peak_memory("cpu") * 2**30 / 1e9}


def _apart(call: str) -> dict[str, object]:
    """Return the row that a function of this module returns in a process of its own."""
    code = f"import json; from whalelib import bench; print(json.dumps(bench.{call}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def training_steps() -> list[dict[str, object]]:
    """Return :func:`training_step` of the LAB's networks, each in a process of its own, beside a matrix product."""
    peak, rows = matrix_peak(), []
    for name in LAB:
        row = _apart(f"training_step({name!r}, channels_last=True)")
        del row["device"]  # the table says on what it was measured
        rows.append(row | {"share of peak": row["TFLOP/s"] / peak})
    return rows


STEP_VARIANTS = ("plain", "channels last", "channels last, memory kept", "channels last, memory kept, bf16")


def lab_step(variant: str, seconds: float = 8.0) -> dict[str, object]:
    """Time training steps of the baseline's network on 32 images, in one of the STEP_VARIANTS.

    For a process of its own: what the allocator was once told it can't forget. "plain" is the eager loop in float32 and
    torch's own layout; ``losses`` are those of the first steps, for comparison.
    """
    if "memory kept" in variant:
        keep_memory()
    layout = torch.channels_last if "last" in variant else torch.contiguous_format
    model = baseline.network(300, 0).to(memory_format=layout).train()
    learner = baseline.optimizer(model)
    generator = torch.Generator().manual_seed(0)
    batch = {"label": torch.randint(300, (32,), generator=generator)}
    batch["image"] = torch.rand(32, 3, *baseline.SIZES["lab"], generator=generator).to(memory_format=layout)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in variant):
            output = model(batch["image"])
        value = baseline.loss({"logits": output["logits"].float()}, batch)
        value.backward()
        learner.step()
        learner.zero_grad()
        return value.item()

    first_losses = [step() for _ in range(4)]
    end, took = time.perf_counter() + seconds, []
    while len(took) < 3 or time.perf_counter() < end:
        took.append(_timed(step)[1])
    return {"variant": variant, "images a second": 32 / float(np.median(took)), "losses": first_losses}


def lab_steps() -> list[dict[str, object]]:
    """Return :func:`lab_step` of all variants, each in a process of its own, twice in turn; the better is kept."""
    best: dict[str, dict] = {}
    for _ in range(2):
        for variant in STEP_VARIANTS:
            if "bf16" in variant and not torch.cpu._is_avx512_bf16_supported():
                continue
            row = _apart(f"lab_step({variant!r})")
            if variant not in best or row["images a second"] > best[variant]["images a second"]:
                best[variant] = row
    plain = best["plain"]
    expected = np.array(plain["losses"])
    for row in best.values():
        row["times plain"] = row["images a second"] / plain["images a second"]
        row["largest difference of loss"] = float(np.abs(np.array(row["losses"]) - expected).max())
    for row in best.values():
        row["loss of the fourth step"] = row.pop("losses")[-1]
    return list(best.values())


def course_times(build: Path | None = None) -> list[dict[str, object]]:
    """Return how long the notebooks of the last `make course` took, several at a time; none if there was none."""
    from whalelib.course import execute, notebooks  # noqa: PLC0415 - needs the course's extra

    build = build or place("WHALE_BUILD", "build")
    rows = []
    for notebook in notebooks.discover(project_root() / "notebooks"):
        if outcome := execute.load(build, notebook):
            rows.append({"notebook": outcome.number, "title": outcome.title, "seconds": outcome.seconds})
    return rows


TABLES: dict[str, Callable[[], list[dict[str, object]]]] = {
    "augmentations": augmentations,
    "losses": loss_times,
    "samplers": samplers,
    "catalog": catalog_times,
    "retrieval": retrieval,
    "lab_step": lab_steps,
    "training_step": training_steps,
    "course": course_times,
}


def folder() -> Path:
    """Return where the tables are kept."""
    return place("WHALE_BENCH", "data/bench")


def environment() -> dict[str, object]:
    """Return on what a table is measured: columns of every row of it."""
    processors = [line for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    machine = processors[0].split(":")[1].strip() if processors else platform.processor()
    found = {"processor": machine or platform.machine(), "processors": os.cpu_count()}
    found |= {"threads": torch.get_num_threads(), "torch": torch.__version__, "numpy": np.__version__}
    return found | {"date": datetime.now(UTC).date().isoformat()}


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def keep(name: str, rows: list[dict[str, object]], *, add: bool = False) -> Path:
    """Write a table, with the environment in every row; or add to one."""
    path, new = folder() / f"{name}.csv", pd.DataFrame(rows).assign(**environment())
    with locked(folder()), replacing(path) as part:
        whole = pd.concat([pd.read_csv(path), new]) if add and path.exists() else new
        whole.to_csv(part, index=False, float_format="%.5g")
    return path


def _timed(function: Callable[[], object]) -> tuple[object, float]:
    began = time.perf_counter()
    found = function()
    return found, time.perf_counter() - began


def _least(function: Callable[[], object], seconds: float, most: int = 2_000) -> float:
    """Return the mean seconds of a call, the least of five rounds."""
    function()
    _, once = _timed(function)
    calls = max(1, min(most, int(seconds / 5 / max(once, 1e-9))))
    return min(_timed(lambda: [function() for _ in range(calls)])[1] for _ in range(5)) / calls


def _in_turn(functions: dict[str, Callable[[], object]], seconds: float, rounds: int = 5) -> dict[str, float]:
    """Return the least seconds of a call of each, measured in turn."""
    least = dict.fromkeys(functions, math.inf)
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            least[name] = min(least[name], _least_once(function, seconds / rounds))
    return least


def _least_once(function: Callable[[], object], seconds: float) -> float:
    end, least = time.perf_counter() + seconds, math.inf
    while least == math.inf or time.perf_counter() < end:
        least = min(least, _timed(function)[1])
    return least


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
    """Measure, and print a line of JSON for each; or all tables of `make bench`, and keep them."""
    parser = argparse.ArgumentParser(prog="python -m whalelib.bench", description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("tables", "step", "loader"))
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME")
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
    if chosen.what == "tables":
        for number, name in enumerate(chosen.tables, start=1):
            rows, took = _timed(TABLES[name])
            tell(f"[{number}/{len(chosen.tables)}] {name}: {took:.0f} s")
            tell(pd.DataFrame(rows).round(4).to_string(index=False) if rows else "nothing to measure yet")
            if rows:
                tell(f"-> {keep(name, rows)}")
        return 0
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
