import functools
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset

from whalelib import train
from whalelib.losses import cross_entropy
from whalelib.train import CheckpointError, TrainingError, fit, load_weights, save_weights

EPOCHS, STEPS = 3, 8


class Noise(Dataset):
    """34 images in three classes, other ones each epoch: a function of (seed, epoch, index)."""

    epoch = 0

    def __init__(self, size=34):
        self.size = size

    def __len__(self):
        return self.size

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __getitem__(self, index):
        image = np.random.default_rng([7, self.epoch, index]).random((3, 8, 8), dtype=np.float32)
        return {"image": torch.from_numpy(image) + index % 3, "label": index % 3, "index": index}


class Network(nn.Module):
    """What a resume can get wrong in small: normalisation, dropout, and a memory layout of its own."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.ReLU(),
                nn.Dropout(0.3),
                nn.Flatten(),
                nn.Linear(288, 3),
            ).to(memory_format=torch.channels_last)

    def forward(self, images):
        return self.layers(images)


def plain_loss(logits, batch):
    return {
        "loss": cross_entropy(logits, batch["label"]),
        "right": (logits.argmax(1) == batch["label"]).float().mean(),
    }


def adam(model, lr=1e-2):
    return torch.optim.AdamW(model.parameters(), lr=lr)


def run(folder=None, epochs=EPOCHS, model=None, loss=plain_loss, dataset=None, **options):
    model = Network() if model is None else model
    options = {
        "batch_size": 4,
        "optimizer": adam,
        "schedule": lambda at: 1 / (1 + at),
        "clip": 5.0,
        **options,
    }
    history = fit(model, dataset or Noise(), loss, epochs=epochs, folder=folder, device="cpu", **options)
    return model, history


def state_of(folder):
    """All that a finished run leaves: weights, buffers, optimizer, and the log without its times."""
    checkpoint = train.Checkpoints(folder, {}).latest()
    tensors = {f"{name}/{key}": value for name in ("model", "optimizer")
               for key, value in load_file(checkpoint / f"{name}.safetensors").items()}  # fmt: skip
    return tensors, pd.read_csv(folder / "log.csv").drop(columns="seconds")


def assert_same(folder, other):
    (tensors, log), (expected, expected_log) = state_of(folder), state_of(other)
    assert tensors.keys() == expected.keys()
    assert any("running_mean" in name for name in tensors) and any("exp_avg_sq" in name for name in tensors)
    for name, value in expected.items():
        assert torch.equal(tensors[name], value), name
    pd.testing.assert_frame_equal(log, expected_log, check_exact=True)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return folder


def fatal(function, count):
    """Return the function with its count-th call replaced by a SIGKILL."""
    calls = itertools.count(1)

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return wrapped


def train_until_killed(action, count, threads, folder):
    """Train in this process and be killed at the count-th call of what ``action`` names."""
    torch.set_num_threads(int(threads))
    places = {
        "step": (sys.modules[__name__], "cross_entropy"),
        "write": (train, "_write_tensors"),
        "rename": (os, "replace"),
        "remove": (shutil, "rmtree"),
    }
    module, name = places[action]
    setattr(module, name, fatal(getattr(module, name), int(count)))
    run(Path(folder), checkpoint_every=3)


# With 3 epochs of 8 steps and a checkpoint every 3 steps: any step after the first checkpoint; before the
# first and before the second file of one; before its renaming; before the removal of the one before.
KILLS = [
    ("step", np.random.default_rng().integers(5, EPOCHS * STEPS + 1)),
    ("write", 7),
    ("write", 8),
    ("rename", 6),
    ("remove", 5),
]


def test_a_compiled_network_is_trained_and_resumed_alike(straight, tmp_path, monkeypatch):
    # This backend needs no compiler.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    run(tmp_path, epochs=1, compiled=True)
    run(tmp_path, epochs=2)
    run(tmp_path, compiled=True)
    assert_same(tmp_path, straight)


@pytest.mark.parametrize(("action", "count"), KILLS, ids=[action for action, _ in KILLS])
def test_a_killed_run_resumes_bit_for_bit(straight, tmp_path, action, count):
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_train as t"
    command = [sys.executable, "-c", f"{program}; t.train_until_killed(*sys.argv[1:])"]
    arguments = [action, str(count), str(torch.get_num_threads()), str(tmp_path)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = json.loads((train.Checkpoints(tmp_path, {}).latest() / "state.json").read_text())["progress"]
    print(f"killed at {action} {count}, resumed from epoch {left['epoch']} step {left['step']}")
    assert (left["epoch"], left["step"]) < (EPOCHS, 0)
    run(tmp_path, checkpoint_every=3)
    assert_same(tmp_path, straight)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1


@pytest.mark.parametrize("stop_at", range(1, EPOCHS * STEPS, 5))
def test_any_interruption_resumes_bit_for_bit(straight, tmp_path, stop_at):
    calls = 0

    def plain_loss(logits, batch):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt
        return globals()["plain_loss"](logits, batch)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, loss=plain_loss, checkpoint_every=2)
    torch.manual_seed(stop_at)  # what the next process finds is not what this one left
    run(tmp_path, checkpoint_every=5)
    assert_same(tmp_path, straight)


def test_more_epochs_continue(straight, tmp_path):
    run(tmp_path, epochs=1)
    _, history = run(tmp_path)
    assert history["epoch"].tolist() == [1, 2, 3]
    assert_same(tmp_path, straight)


def test_a_finished_run_is_not_trained_again(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    model, history = run(tmp_path, loss=plain_loss)
    assert len(history) == EPOCHS
    expected = state_of(straight)[0]
    assert all(torch.equal(value, expected[f"model/{name}"]) for name, value in model.state_dict().items())
    assert model.layers[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_fewer_epochs_than_done_are_refused(straight):
    with pytest.raises(CheckpointError, match="beyond epochs = 2"):
        run(straight, epochs=2)


def test_without_a_folder_the_same(straight):
    model, history = run()
    tensors, log = state_of(straight)
    assert all(torch.equal(value, tensors[f"model/{name}"]) for name, value in model.state_dict().items())
    assert history["loss"].tolist() == log["loss"].tolist()


def test_warm_cosine():
    factors = [train.warm_cosine(position / 10, epochs=10, warmup=0.2) for position in range(101)]
    assert 0 < factors[0] < 0.02
    assert factors[-1] == pytest.approx(0)
    assert factors.index(max(factors)) in (19, 20)
    assert train.warm_cosine(5, epochs=10, warmup=0) == pytest.approx(0.5)
    options = [functools.partial(train.warm_cosine, epochs=epochs) for epochs in (3, 5)]
    assert list(train._differences(*map(train._name, options))) == ["arguments[0].epochs: 3 there, 5 here"]


def test_another_seed_gives_another_run():
    assert run(seed=1)[1]["loss"].tolist() != run(seed=0)[1]["loss"].tolist()


def test_training_leaves_the_generator_and_the_mode_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    model, _ = run(epochs=1, model=Network().eval())
    assert torch.equal(torch.rand(2), expected)
    assert not model.training


def test_the_history(straight):
    _, log = state_of(straight)
    assert log.columns.tolist() == ["epoch", "steps", "loss", "right", "gradient", "lr"]
    assert log["steps"].tolist() == [STEPS] * EPOCHS
    assert log["lr"].tolist() == pytest.approx([1e-2 / (2 - 1 / STEPS + epoch) for epoch in range(EPOCHS)])
    assert log["loss"].iloc[-1] < log["loss"].iloc[0]


def test_the_loop_is_plain_training(tmp_path):
    """The same by hand, without Fabric."""
    model, expected = run(schedule=None)[0], Network().train()
    optimizer, data = adam(expected), Noise()
    for epoch in range(EPOCHS):
        data.set_epoch(epoch)
        for step, indices in enumerate(train.epoch_batches(len(data), 4, seed=0, epoch=epoch)):
            torch.manual_seed(train._draw_seed(0, epoch, step, 0))
            batch = torch.utils.data.default_collate([data[i] for i in indices])
            cross_entropy(expected(batch["image"]), batch["label"]).backward()
            nn.utils.clip_grad_norm_(expected.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"optimizer": functools.partial(adam, lr=2e-2)},
            r"optimizer\.groups\[0\]\.lr: 0\.01 there, 0\.02 here",
        ),
        ({"seed": 5}, "seed: 0 there, 5 here"),
        ({"batch_size": 8}, "batch_size: 4 there, 8 here"),
        ({"dataset": Noise(20)}, r"dataset\.items: 34 there, 20 here"),
        ({"loss": functools.partial(plain_loss)}, "loss"),
        ({"settings": {"crop": "box"}}, r"settings\.crop: None there, box here"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(192, 3))}, r"model\.class"),
        ({"optimizer": lambda model: torch.optim.SGD(model.parameters(), 0.1)}, "AdamW there, SGD here"),
        ({"clip": None}, r"clip: 5\.0 there, None here"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(straight, options, message):
    before = sorted(path.stat().st_mtime_ns for path in straight.rglob("*"))
    with pytest.raises(CheckpointError, match=message):
        run(straight, **options)
    assert before == sorted(path.stat().st_mtime_ns for path in straight.rglob("*"))


def test_starting_again(straight, tmp_path):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    _, history = run(tmp_path, epochs=1, seed=5, resume=False)
    assert len(history) == len(pd.read_csv(tmp_path / "log.csv")) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["00001-0000000"]


def cut(path):
    path.write_bytes(path.read_bytes()[:30])


def empty(path):
    path.write_bytes(b"")


def change_byte(path):
    content = bytearray(path.read_bytes())
    place = (
        max(i for i, value in enumerate(content) if chr(value).isdigit()) if path.suffix == ".json" else -5
    )
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*train.Checkpoints.FILES, "crc32.json"])
@pytest.mark.parametrize("damage", [cut, empty, Path.unlink, change_byte])
def test_a_damaged_checkpoint_is_named(straight, tmp_path, name, damage):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    damage(train.Checkpoints(tmp_path, {}).latest() / name)
    model = Network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    # A wrong checksum speaks against the file that it is of.
    named = "|".join([*train.Checkpoints.FILES, name]) if name == "crc32.json" else name
    with pytest.raises(CheckpointError, match=f"({named}): damaged"):
        run(tmp_path, model=model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    run(tmp_path, epochs=1, resume=False)


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run(straight, tmp_path, broken):
    calls = 0

    def plain_loss(logits, batch):
        nonlocal calls
        calls += 1
        found = globals()["plain_loss"](logits, batch)
        if calls == STEPS + 3:
            # The square root has no slope at 0: a finite loss with a gradient that is none.
            extra = logits.sum() * math.nan if broken == "loss" else (logits * 0).sum().sqrt()
            found["loss"] = found["loss"] + extra
        return found

    with pytest.raises(TrainingError, match=f"epoch 2, step 3.*{broken} is nan"):
        run(tmp_path, loss=plain_loss, checkpoint_every=1)
    run(tmp_path)
    assert_same(tmp_path, straight)


def test_stop_and_best(tmp_path):
    scores = iter([0.5, 0.9, 0.7, 0.8])
    saved = []

    def on_epoch(model, row):
        saved.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"MAP@5": np.float32(next(scores))}

    options = {"on_epoch": on_epoch, "best": "MAP@5", "stop": lambda row: row["epoch"] == 3}
    _, history = run(tmp_path, epochs=9, **options)
    assert history["MAP@5"].tolist() == pytest.approx([0.5, 0.9, 0.7])
    _, again = run(tmp_path, epochs=9, **options)
    assert len(again) == 3
    model = Network()
    load_weights(model, tmp_path / "best.safetensors")
    assert all(torch.equal(value, saved[1][name]) for name, value in model.state_dict().items())


def test_best_needs_its_name():
    with pytest.raises(ValueError, match="best = 'MAP': the log has epoch, steps, loss"):
        run(best="MAP")


def test_weights_alone(tmp_path):
    model, other = run(epochs=1)[0], Network()
    save_weights(model, tmp_path / "weights.safetensors")
    load_weights(other, tmp_path / "weights.safetensors")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"weights\.safetensors"):
        load_weights(nn.Linear(2, 2), tmp_path / "weights.safetensors")
    with pytest.raises(CheckpointError, match=r"missing\.safetensors"):
        load_weights(other, tmp_path / "missing.safetensors")


@pytest.mark.parametrize(("count", "size"), [(10, 4), (8, 4), (3, 4), (1, 1)])
def test_batches_take_each_once(count, size):
    seen = [index for batch in train.epoch_batches(count, size, seed=0, epoch=0) for index in batch]
    assert len(seen) == len(set(seen)) == (count if count < size else count - count % size)
    assert train.epoch_batches(count, size, seed=0, epoch=0) == train.epoch_batches(
        count, size, seed=0, epoch=0
    )


def test_batches_of_a_sampler():
    weighted = torch.utils.data.WeightedRandomSampler([0, 0, 1, 1], 8)
    drawn = [train.epoch_batches(4, 4, weighted, seed=0, epoch=epoch) for epoch in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {index for batch in drawn[0] for index in batch} <= {2, 3}
    assert train.epoch_batches(4, 99, [[0, 1, 2], [3, 0]], seed=0, epoch=0) == [[0, 1, 2], [3, 0]]
    with pytest.raises(ValueError, match="gave nothing"):
        train.epoch_batches(4, 2, [], seed=0, epoch=0)


def test_set_epoch_reaches_sampler_and_loss():
    class Told:
        def __init__(self):
            self.epochs = []

        def set_epoch(self, epoch):
            self.epochs.append(epoch)

        def __iter__(self):
            return iter(range(8))

        def __call__(self, logits, batch):
            return cross_entropy(logits, batch["label"])

    sampler, loss = Told(), Told()
    run(loss=loss, sampler=sampler)
    assert sampler.epochs == loss.epochs == [0, 1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "0 epochs"),
        ({"batch_size": 0}, "batches of 0"),
        ({"precision": "16-mixed"}, "precision = '16-mixed'"),
        (
            {"optimizer": lambda model: torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)},
            "is not the model's",
        ),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)


def test_bfloat16_needs_a_cpu_that_has_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    with pytest.raises(ValueError, match="no bfloat16 instructions"):
        run(precision="bf16-mixed")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert math.isfinite(run(precision="bf16-mixed", epochs=1)[1]["loss"][0])


def test_workers_change_nothing(straight):
    model, _ = run(workers=2)
    tensors, _ = state_of(straight)
    assert all(torch.equal(value, tensors[f"model/{name}"]) for name, value in model.state_dict().items())


def test_nothing_is_printed_but_the_bar(capfd):
    run(epochs=1)
    out, err = capfd.readouterr()
    assert not out
    assert "Training" in err or "Epoch" in err or not err.strip()
    assert "warn" not in err.lower()


def test_two_processes_share_the_batches(tmp_path):
    """Each takes half of every batch; without dropout and normalisation that is the same training.

    Both leave the group in the end: once in a hundred times a process with gloo's threads aborts when it exits.
    """
    script = tmp_path / "script.py"
    script.write_text(f"""
import atexit
import os
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads(1)
from pathlib import Path
import test_train

def look():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    if any("gloo" in name for name in names):
        print(names, flush=True)
        os._exit(3)

atexit.register(look)  # called after what is registered later
test_train.run(Path(sys.argv[1]), model=test_train.linear(), checkpoint_every=3)
""")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(script),
    ]
    subprocess.run([*command, str(tmp_path / "two")], check=True, timeout=300)
    run(tmp_path / "one", model=linear())
    (tensors, log), (expected, expected_log) = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    for name, value in expected.items():
        assert torch.allclose(tensors[name], value, atol=1e-5), name
    pd.testing.assert_frame_equal(log, expected_log, rtol=1e-4)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))


class Linear(nn.Module):
    """Without normalisation: an image counts the same in any batch."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = nn.Linear(192, 3)

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("images", [32, 36])  # 36: an epoch ends with a step of one batch
def test_accumulated_batches_make_the_step_of_one_large_batch(images):
    order = range(images)
    options = {"dataset": Noise(images), "sampler": order, "schedule": None}
    large, one = run(model=Linear(), batch_size=8, **options)
    small, several = run(model=Linear(), batch_size=4, accumulate=2, **options)
    if images == 32:
        for name, value in large.state_dict().items():
            torch.testing.assert_close(small.state_dict()[name], value)
        assert several["gradient"].tolist() == pytest.approx(one["gradient"].tolist(), rel=1e-4)
    assert several["steps"].tolist() == [images // 4] * EPOCHS


def test_accumulation_by_epoch():
    options = {"epochs": 1, "dataset": Noise(32), "sampler": range(32), "schedule": None}
    first, _ = run(model=Linear(), batch_size=8, **options)
    both, _ = run(model=Linear(), batch_size=4, accumulate=lambda epoch: 2 if epoch < 1 else 1, **options)
    torch.testing.assert_close(both.state_dict(), first.state_dict())


def test_the_last_snapshots_are_kept_and_a_resumed_run_keeps_the_same(tmp_path):
    options = {"snapshots": (2, 2), "accumulate": 3, "epochs": 7}
    run(tmp_path / "whole", **options)
    run(tmp_path / "parts", **{**options, "epochs": 3})
    run(tmp_path / "parts", **options)
    found = [sorted((tmp_path / name / "snapshots").iterdir()) for name in ("whole", "parts")]
    assert [path.name for path in found[0]] == ["00004.safetensors", "00006.safetensors"]
    for one, other in zip(*found, strict=True):
        assert one.name == other.name
        assert one.read_bytes() == other.read_bytes()


def test_snapshots_up_to_the_best_epoch(tmp_path):
    scores = iter([1, 2, 5, 3, 4])
    run(
        tmp_path,
        epochs=5,
        snapshots=(1, 2),
        best="score",
        on_epoch=lambda *_: {"score": next(scores)},
    )
    kept = sorted(path.name for path in (tmp_path / "best-snapshots").iterdir())
    assert kept == ["00002.safetensors", "00003.safetensors"]


def test_the_average_of_weights_is_their_mean_and_its_statistics_are_its_own(tmp_path):
    run(tmp_path, epochs=4, snapshots=(1, 3))
    paths = sorted((tmp_path / "snapshots").iterdir())
    images = torch.stack([Noise()[i]["image"] for i in range(30)])
    model = Network().eval()
    train.average_weights(model, paths, images.split(10))
    files = [load_file(path) for path in paths]
    assert len(files) == 3
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), sum(file[name] for file in files) / 3)
    with torch.no_grad():
        means = [model.layers[0](part).mean((0, 2, 3)) for part in images.split(10)]
    torch.testing.assert_close(model.layers[1].running_mean, torch.stack(means).mean(0))
    assert not model.training
    with pytest.raises(ValueError, match="no weights"):
        train.average_weights(model, [], [])


@pytest.mark.parametrize("group", [1, 3])
def test_a_trial_makes_its_steps_and_keeps_nothing(straight, tmp_path, group):
    with train.trial(2), pytest.raises(train.TrialEnded) as ended:
        run(tmp_path, checkpoint_every=1, accumulate=group)
    assert ended.value.steps == len(ended.value.losses) == 2
    assert ended.value.seconds > 0
    assert not [*tmp_path.rglob("*.*")]
    run(tmp_path)  # a trial leaves nothing behind
    assert_same(tmp_path, straight)
