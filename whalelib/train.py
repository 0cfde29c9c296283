"""One training loop for every network of the course: Lightning Fabric, and checkpoints that survive a kill.

The loop saves no state of a random generator. Before each step it seeds torch from (seed, epoch, step), and
the order of an epoch comes from (seed, epoch): so a run that was stopped anywhere goes on as if it had not
been, to the same weights, bit for bit on a CPU (same processor, same number of threads).

Several GPUs: start the script with ``torchrun --nproc-per-node N``; the loop shares each batch among them.
"""

import atexit
import ctypes
import functools
import hashlib
import json
import logging
import math
import os
import platform
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
from lightning_fabric import Fabric
from lightning_utilities import apply_to_collection
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from whalelib.files import replacing

PRECISIONS = ("32-true", "bf16-mixed")


class TrainingError(RuntimeError):
    """Training can't go on."""


class CheckpointError(RuntimeError):
    """A checkpoint can't be used or written."""


class TrialEnded(Exception):
    """A trial has made its steps: how many, their losses, and the seconds of all but the first."""

    def __init__(self, losses: list[float], seconds: float):
        super().__init__(f"{len(losses)} steps, losses {losses}")
        self.steps, self.losses, self.seconds = len(losses), losses, seconds


class _Trial:
    """Counts the steps of a trial."""

    def __init__(self, steps: int):
        self.steps, self.losses, self.began = steps, [], 0.0

    def count(self, loss: torch.Tensor) -> None:
        self.losses.append(loss.item())
        self.began = self.began or time.monotonic()
        if len(self.losses) == self.steps:
            raise TrialEnded(self.losses, time.monotonic() - self.began)


_TRIAL: ContextVar[_Trial | None] = ContextVar("trial", default=None)


@contextmanager
def trial(steps: int) -> Iterator[None]:
    """Let every ``fit`` in the block end after so many steps of the optimizer, keeping nothing.

    It then raises :class:`TrialEnded`: a way to see what a step of a training takes before days are spent on it.
    """
    token = _TRIAL.set(_Trial(steps))
    try:
        yield
    finally:
        _TRIAL.reset(token)


@dataclass
class Progress:
    """How far a run is: all that the next step depends on besides weights and optimizer.

    ``epoch`` and ``step`` (in the epoch) of the next step; ``sums`` over the epoch's steps so far of what
    is logged; ``seconds`` they took; ``rows`` of the finished epochs.
    """

    epoch: int = 0
    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def fit(
    model: nn.Module,
    dataset: Dataset,
    loss: Callable[[Any, dict], torch.Tensor | dict[str, torch.Tensor]],
    *,
    epochs: int,
    folder: Path | None = None,
    batch_size: int = 32,
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    schedule: Callable[[float], float] | None = None,
    clip: float | None = None,
    accumulate: int | Callable[[int], int] = 1,
    sampler: Iterable | None = None,
    seed: int = 0,
    device: str = "auto",
    precision: str = "32-true",
    workers: int = 0,
    compiled: bool = False,
    resume: bool = True,
    checkpoint_every: int | None = None,
    stop: Callable[[dict], bool] | None = None,
    on_epoch: Callable[[nn.Module, dict], dict | None] | None = None,
    best: str | Callable[[list[dict]], float] | None = None,
    snapshots: tuple[int, int] | None = None,
    settings: dict | None = None,
) -> pd.DataFrame:
    """Train a model and return its history; the model is left trained, on the device.

    Args:
        model: called with ``batch["image"]``.
        dataset: items are dicts of what can be collated, with ``image`` (C, H, W). Its ``set_epoch``, the
            sampler's and the loss's, where they have one, are called with the epoch, from 0.
        loss: of (the model's output, batch): a scalar, or a dict of scalars to log whose ``loss`` is lowered. Each of
            several processes is given the whole batch's, but for ``image``.
        epochs: how many in all; a finished run is continued by asking for more.
        folder: for checkpoints and ``log.csv``; None keeps nothing.
        batch_size: images a step, over all processes. An incomplete last batch is left out, unless it is
            the only one.
        optimizer: of the model; default AdamW, lr 1e-3.
        schedule: from the position in epochs (2.5: in the middle of the third) to a factor of each group's
            learning rate; default 1. A function of the position alone, so nothing of it needs saving.
        clip: highest norm of the gradient, or None.
        accumulate: batches whose gradients are averaged for one step of the optimizer, as if they were one larger
            batch (but for batch normalisation, which sees each by itself); or a function of the epoch, from 0. What an
            epoch has left over makes a smaller last step.
        sampler: yields an epoch's indices, or its batches as lists; default each index once, shuffled. Its
            draws come from torch's generator, or from its own seeded by ``set_epoch``.
        seed: of order, dropout and the like; give the dataset its own.
        device: "auto", "cpu" or "cuda".
        precision: "32-true" or "bf16-mixed".
        workers: processes that load; 0 loads between steps.
        compiled: by torch.compile, which takes minutes at the first step and saves a third of the later ones.
        resume: go on from the folder's checkpoint, if any. False discards what the folder holds of an
            earlier run.
        checkpoint_every: steps between checkpoints within an epoch; default none but at each epoch's end.
        stop: told each epoch's row, ends the run when true.
        on_epoch: called with (model, row) after each epoch, for instance to validate; what it returns is
            logged.
        best: a logged name, or a function of the rows so far: the weights of the epoch where it is highest are kept
            as ``best.safetensors``, the optimizer's state with them; see ``load_best``.
        snapshots: (every, count): after every so many epochs the weights are kept in ``snapshots/``, the last ``count``
            of them; with ``best`` those up to the best epoch. See ``average_weights``.
        settings: what else must be the same for a checkpoint to be continued (plain values).

    Returns:
        One row an epoch: ``epoch`` from 1, ``steps``, means of what ``loss`` gave and of ``gradient`` (its
        norm before clipping), ``lr`` (first group, last step), ``seconds``, and what ``on_epoch`` returned.

    Raises:
        TrainingError: a loss or gradient that is not finite. The last good checkpoint is kept.
        CheckpointError: the folder's checkpoint is damaged, was made with other settings, or is beyond
            ``epochs``; or the folder can't be written, which is tried before the first step, or its disk is full.
        TrialEnded: inside a :func:`trial`, after its steps.
        ValueError: an argument that makes no sense.
    """
    if epochs < 1 or batch_size < 1 or not len(dataset):
        raise ValueError(f"{epochs} epochs of batches of {batch_size} from {len(dataset)} items")
    fabric = _fabric(device, precision)
    keep_memory()
    was_training = model.training
    optimizer = (optimizer or _adamw)(model)
    rates = [group["lr"] for group in optimizer.param_groups]
    recipe = {
        "batch_size": batch_size,
        "clip": clip,
        "accumulate": accumulate if isinstance(accumulate, int) else _name(accumulate),
        "snapshots": snapshots,
        "precision": precision,
        "seed": seed,
        "loss": _name(loss),
        "schedule": _name(schedule),
        "sampler": _name(sampler),
        "dataset": {"items": len(dataset), "fingerprint": getattr(dataset, "fingerprint", None)},
        "model": _shape(model),
        "optimizer": _hyperparameters(model, optimizer),
        "settings": settings or {},
    }
    network, stepper = fabric.setup(torch.compile(model) if compiled else model, optimizer)
    checkpoints = Checkpoints(folder, recipe, writes=fabric.is_global_zero)
    checkpoints.prepare(resume)
    fabric.barrier()
    progress = checkpoints.load(model, optimizer)
    if (progress.epoch, progress.step) > (epochs, 0):
        raise CheckpointError(
            f"{checkpoints.latest()}: beyond epochs = {epochs}; ask for more, or resume=False"
        )

    with _generator_kept(fabric), _bar(fabric) as bar:
        while progress.epoch < epochs and not (stop and progress.rows and stop(progress.rows[-1])):
            _tell_epoch(progress.epoch, dataset, sampler, loss)
            batches = epoch_batches(len(dataset), batch_size, sampler, seed=seed, epoch=progress.epoch)
            meter = _Meter(fabric, progress, bar, epochs, len(batches))
            model.train()
            group = accumulate if isinstance(accumulate, int) else accumulate(progress.epoch)
            for batch in _seeded(fabric, dataset, batches, progress, seed=seed, workers=workers):
                factor = schedule(progress.epoch + progress.step / len(batches)) if schedule else 1.0
                _set_rates(optimizer, rates, factor)
                values = loss(*_whole(fabric, network(batch["image"]), batch))
                values = values if isinstance(values, dict) else {"loss": values}
                together, last = _group(progress.step, len(batches), group)
                with fabric.no_backward_sync(network, enabled=not last):
                    fabric.backward(values["loss"] / together)
                if last:  # the meter's mean is over batches
                    values = values | {"gradient": together * _update(fabric, network, stepper, clip)}
                meter.add(values)
                progress.step += 1
                if (
                    checkpoint_every
                    and last
                    and progress.step % checkpoint_every == 0
                    and progress.step < len(batches)
                ):
                    meter.read()
                    checkpoints.save(model, optimizer, progress)
            row = meter.finish()
            row |= {"lr": optimizer.param_groups[0]["lr"], "seconds": round(progress.seconds, 2)}
            if on_epoch:
                found = on_epoch(model, dict(row)) if fabric.is_global_zero else None
                row |= _plain(fabric.broadcast(found) or {})
            progress = Progress(epoch=progress.epoch + 1, rows=[*progress.rows, row])
            if snapshots:
                checkpoints.save_snapshot(model, progress.epoch, *snapshots)
            if best:
                checkpoints.save_best(model, optimizer, progress, best)
            checkpoints.save(model, optimizer, progress)
    fabric.barrier()  # the first process has written what the others may read
    model.train(was_training)
    return pd.DataFrame(progress.rows)


def warm_cosine(position: float, epochs: float, warmup: float = 0.1) -> float:
    """Return the factor of a learning rate that rises in a line, then falls to 0 along half a cosine.

    For ``fit``: ``schedule=functools.partial(warm_cosine, epochs=12)``.

    Args:
        position: in epochs.
        epochs: where it ends.
        warmup: share of the epochs that the rise takes.
    """
    rise = min(1.0, 0.01 + position / (warmup * epochs)) if warmup else 1.0
    return rise * 0.5 * (1 + math.cos(math.pi * min(position / epochs, 1.0)))


def epoch_batches(
    count: int, batch_size: int, sampler: Iterable | None = None, *, seed: int, epoch: int
) -> list[list[int]]:
    """Return the batches of an epoch, a function of (seed, epoch) alone: see ``fit``."""
    if sampler is None:
        order = np.random.default_rng([seed, epoch]).permutation(count).tolist()
    else:
        torch.manual_seed(_draw_seed(seed, epoch))
        order = list(sampler)
    if not order:
        raise ValueError("the sampler gave nothing")
    if not isinstance(order[0], int | np.integer):
        return [list(batch) for batch in order]
    order = [int(index) for index in order]
    return [order[i : i + batch_size] for i in range(0, max(len(order) - batch_size, 0) + 1, batch_size)]


class Checkpoints:
    """The last good state of a run, in ``folder/checkpoints/EPOCH-STEP/``, and its ``log.csv``.

    A checkpoint is written under another name, then renamed as a whole; only then is the one before
    removed. It holds ``model.safetensors``, ``optimizer.safetensors`` (a tensor for each parameter and
    quantity), ``state.json`` (progress and recipe) and ``crc32.json``, the checksums of these three.
    """

    FILES = ("model.safetensors", "optimizer.safetensors", "state.json")

    def __init__(self, folder: Path | None, recipe: dict, writes: bool = True):
        folder = None if _TRIAL.get() else folder
        self.folder = None if folder is None else Path(folder)
        self.recipe = json.loads(json.dumps(recipe, default=str))
        self.writes = writes and folder is not None

    def latest(self) -> Path | None:
        """Return the newest checkpoint's folder, None when there is none."""
        if self.folder is None:
            return None
        found = (self.folder / "checkpoints").glob("[0-9]*-[0-9]*")
        return max(found, default=None, key=lambda path: path.name)

    def prepare(self, resume: bool = True) -> None:
        """Find out whether the folder can be written, and remove what a killed run left half written, or all."""
        if not self.writes:
            return
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        for place in (self.folder, self.folder / "checkpoints", self.folder / "snapshots"):
            for part in [*place.glob(".[0-9]*-*"), *place.glob(".tmp*")]:  # the latter are safetensors' own
                if part.is_dir():
                    shutil.rmtree(part)
                else:
                    part.unlink()
        if not resume:
            self.clear()

    def clear(self) -> None:
        """Remove what an earlier run left."""
        if self.writes:
            for name in ("checkpoints", "snapshots", "best-snapshots"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            for name in ("log.csv", "best.safetensors", "best-optimizer.safetensors"):
                (self.folder / name).unlink(missing_ok=True)

    def save(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
        """Write a checkpoint, then the log."""
        if not self.writes:
            return
        home = self.folder / "checkpoints"
        final = home / f"{progress.epoch:05d}-{progress.step:07d}"
        tensors, numbers = _optimizer_state(model, optimizer)
        state = {"progress": asdict(progress), "recipe": self.recipe, "optimizer": numbers}
        with _writing(final), replacing(final) as part:
            part.mkdir()
            _write_tensors(model.state_dict(), part / "model.safetensors")
            _write_tensors(tensors, part / "optimizer.safetensors")
            _write_json(state, part / "state.json")
            _write_json({name: _crc32(part / name) for name in self.FILES}, part / "crc32.json")
            for path in part.iterdir():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        for old in home.iterdir():
            if old != final:
                shutil.rmtree(old, ignore_errors=True)
        self._write_log(progress)

    def save_best(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        progress: Progress,
        best: str | Callable[[list[dict]], float],
    ) -> None:
        """Keep the state apart, if the last row is the highest in ``best``, see ``fit``."""
        rows = progress.rows
        if isinstance(best, str) and best not in rows[-1]:
            raise ValueError(f"best = {best!r}: the log has {', '.join(rows[-1])}")
        if not self.writes:
            return
        found = [row[best] if isinstance(best, str) else best(rows[: i + 1]) for i, row in enumerate(rows)]
        if found[-1] >= max(found):
            names = ("best.safetensors", "best-optimizer.safetensors")
            weights, state = (self.folder / name for name in names)
            with replacing(weights) as part, replacing(state) as other:  # moved when all is written
                _write_tensors(model.state_dict(), part)
                _write_tensors(_optimizer_state(model, optimizer)[0], other)
                if (self.folder / "snapshots").exists():
                    copied = self.folder / "best-snapshots"
                    with _writing(copied), replacing(copied) as copies:
                        shutil.copytree(self.folder / "snapshots", copies)

    def save_snapshot(self, model: nn.Module, epoch: int, every: int, count: int) -> None:
        """Keep the weights of an epoch, from 1, if it is one in ``every``, and the last ``count`` of such alone."""
        if self.writes and epoch % every == 0:
            home = self.folder / "snapshots"
            home.mkdir(parents=True, exist_ok=True)
            path = home / f"{epoch:05d}.safetensors"
            save_weights(model, path)
            kept = sorted(home.glob("*.safetensors"))
            here = kept.index(path) + 1  # what follows is of a run that was begun again
            for old in kept[: max(here - count, 0)] + kept[here:]:
                old.unlink()

    def load(self, model: nn.Module, optimizer: Optimizer) -> Progress:
        """Put the latest checkpoint into the model and the optimizer; without one, change nothing.

        Raises:
            CheckpointError: a file of it is missing or damaged, or it was made by another recipe.
        """
        latest = self.latest()
        if latest is None:
            return Progress()
        path = latest / "crc32.json"
        try:
            checksums = json.loads(path.read_text())
            for name in self.FILES:
                path = latest / name
                if _crc32(path) != checksums[name]:
                    raise ValueError("its checksum is wrong")
            state = json.loads(path.read_text())
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path}: damaged ({error}); remove {latest}, or start again with resume=False"
            ) from error
        if differences := list(_differences(state["recipe"], self.recipe)):
            raise CheckpointError(
                f"{latest}: made with other settings ({'; '.join(differences)}); "
                "use another folder, or start again with resume=False"
            )
        model.load_state_dict(load_file(latest / "model.safetensors"), strict=True)
        _restore_optimizer(model, optimizer, load_file(latest / "optimizer.safetensors"), state["optimizer"])
        progress = Progress(**state["progress"])
        self._write_log(progress)
        return progress

    def _write_log(self, progress: Progress) -> None:
        if self.writes and progress.rows:
            path = self.folder / "log.csv"
            with _writing(path), replacing(path) as part:
                pd.DataFrame(progress.rows).to_csv(part, index=False)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights and buffers as safetensors, all or nothing.

    Raises:
        CheckpointError: the file can't be written.
    """
    with replacing(Path(path)) as part:
        _write_tensors(model.state_dict(), part)


def load_weights(model: nn.Module, path: Path) -> None:
    """Read what ``save_weights`` wrote, or a checkpoint's or a run's best, into a model of the same shape.

    Raises:
        CheckpointError: the file is missing, damaged, or of another model.
    """
    try:
        model.load_state_dict(load_file(path), strict=True)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def load_best(model: nn.Module, optimizer: Optimizer, folder: Path) -> None:
    """Read the best epoch's weights and optimizer's state, for another run to go on from.

    Raises:
        CheckpointError: a file is missing, damaged, or of another model.
    """
    load_weights(model, Path(folder) / "best.safetensors")
    path = Path(folder) / "best-optimizer.safetensors"
    try:
        _restore_optimizer(model, optimizer, load_file(path), {})
    except (OSError, SafetensorError, KeyError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def average_weights(model: nn.Module, paths: Iterable[Path], batches: Iterable[torch.Tensor]) -> None:
    """Give a model the mean of several files of weights, and statistics of its own (SWA, section 5.3.3).

    Each file counts alike: a moving average whose i-th file, from 0, enters with weight 1 / (1 + i) is the mean of
    all, where the report reads decreasing weights. The mean network was never trained, so the statistics of its batch
    normalisations are computed anew, as shipped in one pass in training mode, dropout on.

    Args:
        model: of the files' shape; left in the mode it was in.
        paths: what ``save_weights`` wrote, one or more.
        batches: images (N, C, H, W), once through what the network was trained on.

    Raises:
        ValueError: no files.
        CheckpointError: a file is missing, damaged, or of another model.

    Source: Izmailov et al. (2018).
    """
    paths = list(paths)
    if not paths:
        raise ValueError("no weights to average")
    mean: AveragedModel | None = None
    for path in paths:
        load_weights(model, path)
        mean = mean or AveragedModel(model)
        mean.update_parameters(model)
    model.load_state_dict(mean.module.state_dict())
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        update_bn(batches, model, device=device)


@functools.cache
def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next step.

    It saves the page faults of a network's large buffers: little of the time at 64 x 128 pixels, a fifth at
    96 x 192, a third at 128 x 256 (EfficientNet-Lite0, batch 32, one core).
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 1 << 28)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Put a model into evaluation mode for the block, and leave it as it was.

    Yields:
        The device where its parameters are; the CPU without any.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    finally:
        for module, mode in modes.items():
            module.training = mode


class _Meter:
    """Sums of what a step gives, kept on the device: reading them makes the CPU wait for the GPU."""

    def __init__(self, fabric: Fabric, progress: Progress, bar: tqdm, epochs: int, steps: int):
        self.fabric, self.progress, self.bar = fabric, progress, bar
        self.sums = {
            name: torch.tensor(value, dtype=torch.float64, device=fabric.device)
            for name, value in progress.sums.items()
        }
        self.began = time.monotonic() - progress.seconds
        self.every = 1 if fabric.device.type == "cpu" else 20
        bar.total = epochs * steps
        bar.n = progress.epoch * steps + progress.step
        bar.set_description(f"Epoch {progress.epoch + 1} of {epochs}")

    def add(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.detach().double()
        if self.progress.step % self.every == 0:
            self._check()
        if (trial := _TRIAL.get()) and "gradient" in values:
            trial.count(values["loss"])
        self.bar.update()

    def read(self) -> None:
        """Bring the progress up to date: sums (means over the processes) and seconds."""
        self._check()
        self.sums = {
            name: self.fabric.all_reduce(value, reduce_op="mean") for name, value in self.sums.items()
        }
        self.progress.sums = {name: value.item() for name, value in self.sums.items()}
        self.progress.seconds = time.monotonic() - self.began

    def finish(self) -> dict[str, Any]:
        """Return the epoch's means."""
        self.read()
        means = {name: total / self.progress.step for name, total in self.progress.sums.items()}
        return {"epoch": self.progress.epoch + 1, "steps": self.progress.step, **means}

    def _check(self) -> None:
        for name in ("loss", "gradient"):
            if name in self.sums and not math.isfinite(value := self.sums[name].item()):
                raise TrainingError(
                    f"epoch {self.progress.epoch + 1}, step {self.progress.step + 1} or just before: "
                    f"{name} is {value}. The last good checkpoint, if any, is kept."
                )


def _fabric(device: str, precision: str) -> Fabric:
    if device not in ("auto", "cpu", "cuda") or precision not in PRECISIONS:
        raise ValueError(
            f"device = {device!r}, precision = {precision!r}: choose auto, cpu or cuda; {PRECISIONS}"
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device = 'cuda', but torch finds no CUDA device here")
    if device == "cpu" and precision == "bf16-mixed" and not torch.cpu._is_avx512_bf16_supported():
        raise ValueError(
            "precision = 'bf16-mixed': this CPU has no bfloat16 instructions and would take ten times longer"
        )
    torch.backends.cudnn.benchmark = (
        True  # images of one size: the fastest convolutions are worth looking for
    )
    processes, nodes = (int(os.environ.get(name, "1")) for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"))
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    strategy = "ddp" if processes * nodes > 1 else "auto"
    fabric = Fabric(
        accelerator=device, devices=processes, num_nodes=nodes, strategy=strategy, precision=precision
    )
    fabric.launch()
    if strategy == "ddp":
        _leave_in_the_end()
    return fabric


@functools.cache
def _leave_in_the_end() -> None:
    """Let this process leave the others before it ends: threads of gloo that still run may abort it."""

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    atexit.register(leave)


def _generator_kept(fabric: Fabric) -> AbstractContextManager:
    """Give torch's generator back as it was."""
    return torch.random.fork_rng(devices=[fabric.device] if fabric.device.type == "cuda" else [])


def _whole(fabric: Fabric, output: object, batch: dict) -> tuple[object, dict]:
    """Return a model's output and the batch but for its images as one process would have them.

    Each process has the losses of the whole batch then, which may compare its images, and their gradients, of which
    those of its own images reach its weights: averaged over the processes they are the whole batch's.
    """
    if fabric.world_size == 1:
        return output, batch
    both = fabric.all_gather([output, {**batch, "image": None}], sync_grads=True)
    return apply_to_collection(both, torch.Tensor, lambda parts: parts.flatten(0, 1))


def _bar(fabric: Fabric) -> tqdm:
    quiet = {} if fabric.is_global_zero else {"disable": True}  # else as TQDM_DISABLE says
    return tqdm(desc="Training", unit="step", leave=False, **quiet)


def _tell_epoch(epoch: int, *parts: object) -> None:
    for part in parts:
        if hasattr(part, "set_epoch"):
            part.set_epoch(epoch)


def _set_rates(optimizer: Optimizer, rates: list[float], factor: float) -> None:
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate * factor


def _group(step: int, steps: int, size: int) -> tuple[int, bool]:
    """Return how many batches make the step that batch ``step``, from 0, is part of, and if it is the last of them."""
    full = steps // size * size
    return size if step < full else steps - full, (step + 1) % size == 0 or step + 1 == steps


def _update(fabric: Fabric, network: nn.Module, stepper: Optimizer, clip: float | None) -> torch.Tensor:
    """Let the optimizer take a step, and return the gradient's norm before clipping."""
    limit = math.inf if clip is None else clip
    norm = fabric.clip_gradients(network, stepper, max_norm=limit, error_if_nonfinite=False)
    stepper.step()
    stepper.zero_grad()
    return norm


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return numbers of Python in place of numpy's and torch's."""
    return {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}


def _adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)


def _seeded(
    fabric: Fabric, dataset: Dataset, batches: list[list[int]], progress: Progress, *, seed: int, workers: int
) -> Iterator[dict]:
    """Yield this process's share of each batch still to come, torch being seeded for it."""
    rank, processes = fabric.global_rank, fabric.world_size
    # In a row, so that a group of one whale's images, which some losses compare, stays together.
    share = [np.array_split(batch, processes)[rank].tolist() for batch in batches[progress.step :]]
    if any(len(batch) % processes for batch in batches):
        raise ValueError(f"batches of {len(batches[0])} can't be shared by {processes} processes")
    on_gpu = fabric.device.type == "cuda"
    loader = DataLoader(
        dataset, batch_sampler=share, num_workers=workers, pin_memory=on_gpu, worker_init_fn=_start_worker
    )
    batches_to_come = iter(loader)
    for step in range(progress.step, len(batches)):
        torch.manual_seed(_draw_seed(seed, progress.epoch, step, rank))
        yield fabric.to_device(next(batches_to_come))


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # the workers are the threads


def _draw_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])


def _name(thing: object) -> object:
    if isinstance(thing, functools.partial):
        return {"function": _name(thing.func), "arguments": [*thing.args, thing.keywords]}
    return None if thing is None else getattr(thing, "__name__", type(thing).__name__)


def _shape(model: nn.Module) -> dict[str, object]:
    tensors = {name: [*value.shape, str(value.dtype)] for name, value in model.state_dict().items()}
    digest = hashlib.sha256(json.dumps(tensors, sort_keys=True).encode()).hexdigest()[:16]
    return {"class": type(model).__name__, "tensors": len(tensors), "shapes": digest}


def _parameter_names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the names of the optimizer's parameters, in its order."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter in parameters):
        raise ValueError(
            "the optimizer holds a parameter that is not the model's, so no checkpoint would keep it"
        )
    return [names[id(parameter)] for parameter in parameters]


def _hyperparameters(model: nn.Module, optimizer: Optimizer) -> dict[str, object]:
    digest = hashlib.sha256(json.dumps(_parameter_names(model, optimizer)).encode()).hexdigest()[:16]
    groups = [
        {key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups
    ]
    return {"class": type(optimizer).__name__, "parameters": digest, "groups": groups}


def _optimizer_state(
    model: nn.Module, optimizer: Optimizer
) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    """Return the optimizer's tensors and its other values, both by "parameter.quantity"."""
    names = _parameter_names(model, optimizer)
    state = {
        f"{names[index]}.{key}": value
        for index, values in optimizer.state_dict()["state"].items()
        for key, value in values.items()
    }
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}
    return tensors, {name: value for name, value in state.items() if name not in tensors}


def _restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: dict, numbers: dict) -> None:
    places = {name: index for index, name in enumerate(_parameter_names(model, optimizer))}
    state: dict[int, dict[str, Any]] = {}
    for name, value in (tensors | numbers).items():
        parameter, key = name.rsplit(".", 1)
        state.setdefault(places[parameter], {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape == parameter.shape:
                # The file keeps no memory layout, and another layout may round otherwise.
                values[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _differences(old: object, new: object, name: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}):
            yield from _differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for place, pair in enumerate(zip(old, new, strict=True)):
            yield from _differences(*pair, f"{name}[{place}]")
    elif old != new:
        yield f"{name}: {old} there, {new} here"


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Name the file that can't be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{path}: can't be written ({error}). The last good checkpoint, if any, is kept."
        ) from error


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with _writing(path):
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, path)


def _write_json(values: dict, path: Path) -> None:
    with _writing(path):
        path.write_text(json.dumps(values, indent=1))


def _crc32(path: Path) -> int:
    total = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            total = zlib.crc32(block, total)
    return total
