"""What goes wrong outside: kills, a full disk, damaged files. A clear error, and the last good state kept."""

import errno
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from faulty_training import EPOCHS, SCORES, STEPS
from PIL import Image
from safetensors.torch import load_file
from test_train import Network, adam, assert_same, cut, empty, plain_loss, run, state_of

from whalelib import train
from whalelib.data import PhotographError, open_catalog
from whalelib.data.photographs import Photographs
from whalelib.train import CheckpointError, TrainingError, epoch_batches, load_best, load_weights

KILLS = 20
SIZE = (8, 8)


class Trainings:
    """The process of ``faulty_training.py``: importing torch takes longer than all the trainings."""

    def __init__(self):
        program = [sys.executable, str(Path(__file__).with_name("faulty_training.py"))]
        quiet = os.environ | {"TQDM_DISABLE": "1"}
        self.process = subprocess.Popen(
            program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet
        )

    def __call__(self, folder, work="training", **options):
        print(
            json.dumps({"work": work, "folder": str(folder), **options}), file=self.process.stdin, flush=True
        )
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def trainings():
    found = Trainings()
    yield found
    found.process.stdin.close()
    found.process.wait()


@pytest.fixture(scope="module")
def straight(trainings, tmp_path_factory):
    """The folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight")
    assert trainings(folder)["codes"] == [0]
    return folder


def files(folder):
    """All files of weights by name, and the names of the others."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.suffix == ".safetensors" else None
        for path in paths
    }


def half_written(folder):
    return list(folder.rglob(".*"))


def assert_as_undisturbed(folder, straight):
    assert_same(folder, straight)
    found, expected = files(folder), files(straight)
    assert list(found) == list(expected)
    assert [name for name in found if found[name] != expected[name]] == []


def test_what_a_run_leaves(straight):
    names = {name for name in files(straight) if "checkpoints" not in name}
    assert names == {
        "log.csv",
        "best.safetensors",
        "best-optimizer.safetensors",
        *(f"snapshots/0000{epoch}.safetensors" for epoch in (5, 6)),
        *(f"best-snapshots/0000{epoch}.safetensors" for epoch in (2, 3)),
    }
    assert np.argmax(pd.read_csv(straight / "log.csv")["score"]) == np.argmax(SCORES) == 2


def test_twenty_kills_change_nothing(trainings, straight, tmp_path):
    generator = np.random.default_rng(0)
    hits, begun = [], []
    # Uniform in where the run is, up to its last steps, and in when within a step and the writing after it.
    for at in np.sort(generator.uniform(0, EPOCHS - 0.75, KILLS)):
        found = trainings(tmp_path, kill=[math.floor(at * STEPS) / STEPS, generator.uniform(0, 0.06)])
        assert found["codes"] == [-signal.SIGKILL]
        begun.append(found["said"][0]["at"])
        hits.append(next((said["writing"] for said in found["said"][::-1] if "writing" in said), None))
    print(f"begun at {begun}, killed in {hits}")
    assert begun == sorted(begun) and len({*begun}) > KILLS / 3
    assert hits.count(None) not in (0, KILLS), "kills hit steps and the writing of files"
    assert trainings(tmp_path)["codes"] == [0]
    assert_as_undisturbed(tmp_path, straight)


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    parts = [
        ".7-best.safetensors",
        "snapshots/.7-00001.safetensors",
        "checkpoints/.7-00001-0000000/state.json",
        ".tmpA1b2C3",
        "snapshots/.tmpA1b2C3",
    ]
    for part in parts:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).write_bytes(b"half")
    run(tmp_path, snapshots=(1, 5), best="epoch")
    assert not half_written(tmp_path)


# Which file is written next from this position on, and a limit that it and not the one before passes.
FULL = [
    ("model.safetensors", 2.25, 1_000, 2.25),
    ("optimizer.safetensors", 2.25, 8_000, 2.25),
    ("state.json", 2.25, 15_000, 2.25),
    ("00003.safetensors", 2.875, 1_000, 2.75),
    ("best-optimizer.safetensors", 2.875, 8_000, 2.75),
]


@pytest.mark.parametrize(("name", "at", "size", "left"), FULL, ids=[case[0] for case in FULL])
def test_a_full_disk(trainings, straight, tmp_path, name, at, size, left):
    found = trainings(tmp_path, room=[at, size])
    assert found["codes"] == [1]
    said = found["said"][-1]
    assert said["error"] == "CheckpointError"
    assert name in said["message"] and str(tmp_path) in said["message"]
    assert "too large" in said["message"].lower()
    assert not half_written(tmp_path)
    again = trainings(tmp_path)  # now there is room
    assert again["said"][0]["at"] == left
    assert_as_undisturbed(tmp_path, straight)


@pytest.mark.parametrize("name", ["best.safetensors", "best-snapshots"])
def test_the_best_state_stays_whole_until_the_next_is(tmp_path, monkeypatch, name):
    """The weights, the optimizer's state and the snapshots are of one epoch, wherever the room ends."""
    write, copy = train.save_file, shutil.copytree
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    rows = []

    def writes(tensors, path):
        if len(rows) == 3 and path.name.endswith(f"-{name}"):
            raise full
        write(tensors, path)

    def copies(source, target):
        copy(source, target)
        if len(rows) == 3 and name == "best-snapshots":
            (Path(target) / "00003.safetensors").unlink()
            raise full

    monkeypatch.setattr(train, "save_file", writes)
    monkeypatch.setattr(shutil, "copytree", copies)
    options = {"snapshots": (1, 2), "best": "epoch"}
    with pytest.raises(CheckpointError, match=name):
        run(tmp_path, on_epoch=lambda model, row: rows.append(row), **options)
    model = Network()
    optimizer = adam(model)
    load_best(model, optimizer, tmp_path)
    assert {int(values["step"]) for values in optimizer.state.values()} == {2 * STEPS}
    snapshots = [
        load_file(tmp_path / place / "00002.safetensors") for place in ("snapshots", "best-snapshots")
    ]
    for tensors in snapshots:
        assert torch.equal(model.layers[0].weight, tensors["layers.0.weight"])
    kept = sorted(path.name for path in (tmp_path / "best-snapshots").iterdir())
    assert kept == ["00001.safetensors", "00002.safetensors"]
    assert not half_written(tmp_path)


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("place", ["a file", "in a file", "read only"])
def test_an_unwritable_folder_is_told_before_the_first_step(tmp_path, place, resume):
    (tmp_path / "file").touch()
    folder = {
        "a file": tmp_path / "file",
        "in a file": tmp_path / "file" / "run",
        "read only": Path("/proc/run"),  # even root can't
    }[place]

    def loss(logits, batch):
        pytest.fail("a step was made")

    with pytest.raises(CheckpointError, match=f"{folder}: can't be written"):
        run(folder, loss=loss, resume=resume)


def test_what_is_kept_of_a_run_that_diverges_is_finite(tmp_path):
    calls = itertools.count()

    def loss(logits, batch):
        found = plain_loss(logits, batch)
        return found | {"loss": found["loss"] * (math.nan if next(calls) == 2 * STEPS + 4 else 1)}

    with pytest.raises(TrainingError, match=r"epoch 3, step 5\b.* loss is nan"):
        run(tmp_path, loss=loss, checkpoint_every=2, snapshots=(1, 3), best="right")
    assert train.Checkpoints(tmp_path, {}).latest().name == "00002-0000004"
    weights = [path for path in tmp_path.rglob("*.safetensors") if "optimizer" not in path.name]
    assert {path.parent.name for path in weights} >= {tmp_path.name, "snapshots", "00002-0000004"}
    for path in weights:
        model = Network()
        load_weights(model, path)
        assert all(value.isfinite().all() for value in model.state_dict().values())


def test_to_remove_a_damaged_checkpoint_begins_again(trainings, straight, tmp_path):
    """What the error says to do; ``test_train`` damages each file in each way."""
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    cut(train.Checkpoints(tmp_path, {}).latest() / "optimizer.safetensors")
    before = files(tmp_path)
    said = trainings(tmp_path)["said"][-1]
    assert said["error"] == "CheckpointError" and files(tmp_path) == before
    shutil.rmtree(re.search(r"optimizer\.safetensors: damaged .*; remove (\S+), or", said["message"])[1])
    again = trainings(tmp_path)
    assert (again["codes"], again["said"][0]["at"]) == ([0], 0)
    assert_as_undisturbed(tmp_path, straight)


@pytest.mark.parametrize("damage", [cut, empty, Path.unlink])
@pytest.mark.parametrize(
    "name", ["best.safetensors", "best-optimizer.safetensors", "snapshots/00005.safetensors"]
)
def test_damaged_weights_are_named(straight, tmp_path, name, damage):
    shutil.copytree(straight, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / name)
    model = Network()
    with pytest.raises(CheckpointError, match=f"{tmp_path / name}: "):
        load_best(model, adam(model), tmp_path)
        load_weights(model, tmp_path / name)


@pytest.fixture
def catalog(tmp_path):
    """Twelve photographs of three animals."""
    generator = np.random.default_rng(0)
    for name in ("ada", "bo", "cy"):
        (tmp_path / "animals" / name).mkdir(parents=True)
        for number in range(4):
            pixels = generator.integers(0, 256, (12, 10, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "animals" / name / f"{name}{number}.png")
    return open_catalog(tmp_path / "animals")


def pixels_of(data):
    return np.stack([data.pixels(i) for i in range(len(data))])


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def another_shape(path):
    np.save(path, np.zeros((3, *SIZE, 3), np.uint8))


def unclosed(path):
    path.write_bytes(path.read_bytes().replace(b"}", b" ", 1))


@pytest.mark.parametrize("damage", [cut, empty, half, another_shape, unclosed])
def test_a_damaged_file_of_pixels_is_made_anew(catalog, tmp_path, damage):
    kept = tmp_path / "kept"
    expected = pixels_of(Photographs(catalog, SIZE, folder=kept))
    (path,) = kept.glob("*.npy")
    whole = path.read_bytes()
    damage(path)
    assert np.array_equal(pixels_of(Photographs(catalog, SIZE, folder=kept)), expected)
    assert path.read_bytes() == whole
    assert [*kept.glob("*.npy")] == [path]
    assert [*half_written(kept)] == [kept / ".lock"]


def test_a_changed_photograph_is_decoded_again(catalog, tmp_path):
    before = pixels_of(Photographs(catalog, SIZE, folder=tmp_path / "kept"))
    Image.new("RGB", (10, 12), "white").save(catalog.table["path"][5])
    after = pixels_of(Photographs(catalog, SIZE, folder=tmp_path / "kept"))
    assert (after[5] == 255).all()
    assert np.array_equal(np.delete(after, 5, 0), np.delete(before, 5, 0))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mounts a disk as Linux does")
def test_pixels_on_a_full_disk(trainings, catalog, tmp_path):
    """The room is asked for at first: to fill a mapped file on a full disk ends the process without a word."""
    found = trainings(tmp_path / "disk", work="pixels", animals=str(catalog.root))
    if not found["said"][0].get("mounted"):
        pytest.skip("this process may not mount a disk")
    assert found["codes"] == [1]
    assert found["said"][1]["left"] == []
    assert found["said"][2]["error"] == "OSError"
    assert re.search(rf"No space left.*{tmp_path}/disk/photographs-\w+\.npy", found["said"][2]["message"])


@pytest.mark.parametrize("options", [{}, {"memory": False}, {"folder": "kept"}])
def test_a_photograph_that_vanished(catalog, tmp_path, options):
    kept = {"folder": tmp_path / "kept"} if "folder" in options else {}
    path = Path(catalog.table["path"][7])
    path.unlink()
    with pytest.raises(PhotographError, match=f"{path}: the file is missing"):
        Photographs(catalog, SIZE, **options | kept).pixels(7)
    assert not kept or half_written(kept["folder"]) == [*kept["folder"].iterdir()] == [
        kept["folder"] / ".lock"
    ]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_photograph_that_vanished_while_training(catalog, tmp_path, workers):
    path, away = Path(catalog.table["path"][7]), tmp_path / "away"

    def trained(name, on_epoch=None):
        data = Photographs(catalog, SIZE, memory=False)
        run(tmp_path / name, dataset=data, loss=plain_loss, on_epoch=on_epoch, workers=workers)

    trained("whole")
    # Of a worker's error torch keeps the text, not the kind.
    expected = PhotographError if not workers else RuntimeError
    with pytest.raises(expected, match=f"{path}: the file is missing"):
        trained("parts", lambda *_: path.rename(away) and None)
    assert train.Checkpoints(tmp_path / "parts", {}).latest().name == "00001-0000000"
    away.rename(path)
    trained("parts")
    assert_same(tmp_path / "parts", tmp_path / "whole")


REPEATING = [[0, 1, 2, 3], [3, 2, 8, 9], [0, 0, 1, 1]]


@pytest.mark.parametrize("sampler", [None, REPEATING], ids=["shuffled", "batches"])
def test_two_processes_take_each_image_of_a_batch_once(trainings, tmp_path, sampler):
    found = trainings(tmp_path / "two", work="shared", processes=2, sampler=sampler)
    assert found["codes"] == [0, 0], found["said"][-1]
    taken = [[said["image"] for said in found["said"] if said["rank"] == rank] for rank in range(2)]
    taken = [[each[start : start + 2] for start in range(0, len(each), 2)] for each in taken]
    batches = [batch for epoch in range(2) for batch in epoch_batches(34, 4, sampler, seed=0, epoch=epoch)]
    for one, other, batch in zip(*taken, batches, strict=True):
        assert len(one) == len(other) == 2
        assert sorted(one + other) == sorted(batch)
    assert trainings(tmp_path / "one", work="shared", sampler=sampler)["codes"] == [0]
    (tensors, log), (expected, expected_log) = state_of(tmp_path / "two"), state_of(tmp_path / "one")
    pd.testing.assert_frame_equal(log, expected_log, rtol=1e-4)
    for name, value in expected.items():
        assert torch.allclose(tensors[name], value, atol=1e-5), name


def test_two_processes_have_what_the_first_of_them_keeps(trainings, tmp_path):
    found = trainings(tmp_path, work="kept", processes=2)
    assert found["codes"] == [0, 0], found["said"][-1]
    assert {said["rank"] for said in found["said"] if "wrote" in said} == {"0"}
    kept = load_file(tmp_path / "trained.safetensors")["1.weight"].sum().item()
    assert [said["sum"] for said in found["said"] if "sum" in said] == [kept, kept]
