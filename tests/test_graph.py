"""The graph of tasks: what is skipped, what a failure leaves, and that a killed worker loses nothing."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from whalelib import graph, paper
from whalelib.graph import GraphError, Local, Task, execute, in_order, kept, keys, marker
from whalelib.losses import cross_entropy
from whalelib.recipes import first, third
from whalelib.run import Settings
from whalelib.train import fit, save_weights


def states(outcomes):
    return {one.name: one.state for one in outcomes}


def test_tasks_come_after_what_they_need():
    tasks = [Task("c", dict, ("a", "b")), Task("b", dict, ("a",)), Task("a", dict), Task("d", dict)]
    assert [task.name for task in in_order(tasks)] == ["a", "d", "b", "c"]
    with pytest.raises(GraphError, match="'a'"):
        in_order([Task("a", dict), Task("a", dict)])
    with pytest.raises(GraphError, match="b needs 'z', which is no task"):
        in_order([Task("b", dict, ("z",))])
    with pytest.raises(GraphError, match="need each other: a, b"):
        in_order([Task("c", dict), Task("a", dict, ("b",)), Task("b", dict, ("a",))])


def test_a_hash_changes_with_what_a_task_depends_on_and_so_do_those_after_it():
    def hashes(choice, needs=("a",)):
        return keys([Task("a", dict, depends={"x": choice}), Task("b", dict, needs), Task("c", dict)])

    first, again, other, apart = hashes(1), hashes(1), hashes(2), hashes(1, ())
    assert first == again
    assert [first[name] != other[name] for name in "abc"] == [True, True, False]
    assert (first["b"] == apart["b"], first["a"] == apart["a"]) == (False, True)


def work(log, name, result=None, fails=()):
    log.append(name)
    if name in fails:
        raise RuntimeError(f"{name} went wrong\nand this is a second line")
    return result


def chain(log, choice=1, fails=()):
    """a - b - d, with c beside b and e apart."""

    def do(name):
        return partial(work, log, name, {"number": 3}, fails)

    return [
        Task("a", do("a")),
        Task("b", do("b"), ("a",), {"choice": choice}),
        Task("c", do("c"), ("a",)),
        Task("d", do("d"), ("b", "c")),
        Task("e", do("e")),
    ]


def test_what_is_finished_is_not_done_again(places):
    log, told = [], []
    assert set(states(execute(chain(log), Local(), tell=told.append)).values()) == {"done"}
    assert sorted(log) == list("abcde")
    assert told[0].startswith("[1/5] a ... done 0.0 s, number 3")
    again = execute(chain(log), Local(), tell=told.append)
    assert set(states(again).values()) == {"kept"}
    assert again[0].result == {"number": 3}
    assert len(log) == 5
    changed = states(execute(chain(log, choice=2), Local()))
    assert changed == {"a": "kept", "b": "done", "c": "kept", "d": "done", "e": "kept"}
    assert log[5:] == ["b", "d"]
    assert set(states(execute(chain(log), Local())).values()) == {"kept"}  # the first choice is still there


def test_a_failure_leaves_undone_what_needs_it_and_nothing_else(places, capsys):
    log = []
    outcomes = execute(chain(log, fails="b"), Local())
    assert states(outcomes) == {"a": "done", "b": "failed", "c": "done", "d": "skipped", "e": "done"}
    errors = {one.name: one.error for one in outcomes if one.error}
    assert errors == {"b": "RuntimeError: b went wrong", "d": "for want of b"}
    assert "and this is a second line" in capsys.readouterr().err  # all of it, with its trace
    assert states(execute(chain(log), Local()))["b"] == "done"  # once it can
    assert log.count("a") == 1


def test_a_task_whose_file_is_gone_or_another_is_done_again(places):
    path, log = places / "made.txt", []
    task = Task("makes a file / of text", lambda: log.append(path.write_text("x")) or {"files": [str(path)]})
    for _ in range(2):
        execute([task], Local())
    path.unlink()
    execute([task], Local())
    assert len(log) == 2
    path.write_text("y")  # as another choice of networks may
    execute([task], Local())
    assert (len(log), path.read_text()) == (3, "x")
    found = marker(task.name, keys([task])[task.name])
    assert found.parent == places / "cache" / "graph"
    assert json.loads(found.read_text())["result"]["files"] == [str(path)]
    found.write_text('{"cut o')
    assert kept(task.name, keys([task])[task.name]) is None


def test_commands(places):
    path = places / "made.txt"
    script = "import sys; open(sys.argv[1], 'w').write('x'); sys.exit(int(sys.argv[2]))"
    ok, bad = (Task(code, (sys.executable, "-c", script, str(path), code)) for code in ("0", "3"))
    found = {one.name: one for one in execute([ok, bad], Local())}
    assert (found["0"].state, found["3"].state) == ("done", "failed")
    assert "non-zero exit status 3" in found["3"].error
    assert path.read_text() == "x"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_command_ends_with_the_process_that_runs_it(tmp_path):
    sleeps = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    program = "import sys; from whalelib.graph import command; command(sys.argv[1:])"
    path = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", program, sys.executable, "-c", sleeps, str(path)])
    until(lambda: path.exists() and path.read_text())
    parent.kill()
    parent.wait()
    child = Path("/proc") / path.read_text()
    until(lambda: not child.exists() or ") Z " in (child / "stat").read_text())


def until(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_without_ray_the_error_says_what_to_install(monkeypatch, six_animals, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    options = ["--data", six_animals.settings.data, "--engine", "ray"]
    assert graph.main(options) == 2
    assert "pip install -e '.[cluster]'" in capsys.readouterr().err


# The report's graph


def test_the_graph_of_the_report(six_animals):
    tasks = {task.name: task for task in graph.plan(six_animals.settings)}
    networks = [row.name for row in paper.rows("lab") if row.recipe in paper.RECIPES and not row.extra]
    assert {*networks, "masks", "keypoints/lite0", "landmarks/0"} < set(tasks)
    assert "3.2/2" not in tasks  # these data have no extra photographs
    crops = "crops of the second recipe"
    assert tasks[crops].needs == ("keypoints/lite0", "keypoints/lite1")
    assert tasks["4.2/a"].needs == (crops,)
    assert tasks["4.2/b"].needs == (crops, "4.2/a")
    assert not any(name.startswith(("answer", "ensemble")) for name in tasks)  # nor test photographs
    assert tasks["notebook 05_15"].needs == ("5.2/1",)
    assert tasks["notebook 05_14"].needs == ("5.2/1", "5.2/2", "5.2/3")
    assert len(set(keys(tasks.values()).values())) == len(tasks)


@pytest.fixture
def with_tests(six_animals):
    """Six animals, of whom one photograph each asks for a name."""
    folder = six_animals.catalog.root
    (folder / "test").mkdir()
    for path in sorted((folder / "train").glob("w_*2.png")):
        (folder / "test" / f"asked_{path.name}").write_bytes(path.read_bytes())
    return Settings(data=str(folder))


def test_a_part_of_the_graph_has_all_that_it_needs(with_tests):
    tasks = {task.name: task for task in graph.plan(with_tests, ["4.2/b", "5.2/*"], gpus=1, cpus=4)}
    assert tasks["ensemble of 5.2"].needs == ("5.2/1", "5.2/2", "5.2/3")
    assert "answer of 4.2/b" in tasks
    assert "answer of 4.2/a" not in tasks  # trained for its pseudo labels alone
    assert "ensemble of 4.2" not in tasks  # of one
    assert "masks" not in tasks
    assert [name for name in tasks if name.startswith("notebook")] == ["notebook 05_14", "notebook 05_15"]
    assert {"answer of 5.2/3", "ensemble of 5.2"} < set(tasks["notebook 05_14"].needs)
    assert set(tasks["notebook 05_15"].needs) == {"5.2/1", "answer of 5.2/1", "ensemble of 5.2"}
    assert {(task.gpus, task.cpus) for task in tasks.values()} == {(1, 4)}


def test_several_gpus_are_given_to_trainings_alone(with_tests):
    tasks = {task.name: task for task in graph.plan(with_tests, ["5.2/1"], gpus=4, cpus=2)}
    assert (tasks["5.2/1"].gpus, tasks["5.2/1"].cpus) == (4, 8)
    assert tasks["answer of 5.2/1"].gpus == 1
    words = " ".join(tasks["5.2/1"].work)
    assert "torch.distributed.run --standalone --nproc-per-node 4 -m whalelib.paper run" in words
    parsed = paper._arguments(tasks["5.2/1"].work[tasks["5.2/1"].work.index("run") :])
    assert (parsed.model, parsed.profile, parsed.data) == (["5.2/1"], "lab", with_tests.data)


def test_other_data_settings_or_choices_are_other_tasks(with_tests, monkeypatch):
    def hashes(**options):
        tasks = graph.plan(Settings(**{"data": with_tests.data, **options}), ["5.2/1"])
        return keys(tasks)

    first = hashes()
    assert hashes() == first
    assert hashes(seed=1)["5.2/1"] != first["5.2/1"]
    assert hashes(edition="as_shipped")["landmarks/0"] != first["landmarks/0"]
    table = Path(with_tests.data) / "train.csv"
    table.write_text(table.read_text().replace("w_12.png,w_1", "w_12.png,w_2"))
    changed = hashes()
    assert (changed["5.2/1"] != first["5.2/1"], changed["landmarks/0"] == first["landmarks/0"]) == (
        True,
        True,
    )


def test_an_answer_is_a_submission_with_its_score(with_tests, places, monkeypatch):
    folder = Path(with_tests.data)
    images = sorted(path.name for path in (folder / "test").iterdir())
    lines = [f"{image},{image.removeprefix('asked_')[:3]}" for image in images]
    (folder / "test_labels.csv").write_text("\n".join(["Image,Id", *lines]))
    run = paper.data_of(paper.select(["5.2/1"])[0], with_tests, boxes="true")
    run.catalog = replace(run.catalog, root=folder)
    parts = third.parts(run)
    untrained = first.Trained(third.network("lab", len(parts.known), 0), parts, pd.DataFrame())
    monkeypatch.setattr(paper, "data_of", lambda *_, **__: run)
    monkeypatch.setattr(paper, "trained", lambda *_: untrained)
    found = graph.answer("ensemble of 5.2", ["5.2/1", "5.2/2"], with_tests)
    (path,) = found["files"]
    assert Path(path).name == "ensemble_of_5_2.csv"
    assert len(Path(path).read_text().splitlines()) == 1 + len(images)
    assert 0 <= found["MAP@5"] <= 1


def test_the_command_lists_the_tasks(with_tests, capsys):
    options = ["--data", with_tests.data, "--model", "5.2/1 5.2/2", "--list"]
    assert graph.main(options) == 0
    out = capsys.readouterr().out
    assert out.count("to do") == 8
    assert "ensemble of 5.2" in out
    assert graph.main(["--model", "none", *options[:2]]) == 2
    assert "no run matches 'none'" in capsys.readouterr().err


def test_the_command_says_how_to_give_extra_photographs(with_tests, capsys):
    assert graph.main(["--data", with_tests.data, "--model", "3.2/*"]) == 2
    assert f"--extra, or have it as {with_tests.data}/earlier" in capsys.readouterr().err


def test_cores_are_told_to_the_tasks(with_tests, monkeypatch):
    monkeypatch.setenv("WHALE_CPUS", "")
    monkeypatch.setattr(graph, "execute", lambda *_: [])
    options = ["--data", with_tests.data, "--model", "5.2/1"]
    assert graph.main(options) == 0
    assert os.environ["WHALE_CPUS"] == ""
    assert graph.main([*options, "--cpus", "6"]) == 0
    assert os.environ["WHALE_CPUS"] == "6"


def test_the_command_says_what_is_not_done(with_tests, monkeypatch, capsys):
    monkeypatch.setattr(graph, "plan", lambda *_, **__: chain([], fails="c"))
    assert graph.main(["--data", with_tests.data]) == 1
    out = capsys.readouterr().out
    assert "2 of 5 tasks are not done:" in out
    assert "  c: failed, RuntimeError: c went wrong" in out
    assert "  d: skipped, for want of c" in out
    monkeypatch.setattr(graph, "plan", lambda *_, **__: chain([]))
    assert graph.main(["--data", with_tests.data]) == 0


# On Ray


class Noise(Dataset):
    """20 images of two classes, other ones each epoch; its process is killed at a chosen one, once."""

    def __init__(self, folder, dies):
        self.folder, self.dies, self.epoch = folder, dies, 0

    def __len__(self):
        return 20

    def set_epoch(self, epoch):
        self.epoch = epoch
        with (self.folder / "epochs.txt").open("a") as file:
            file.write(f"{os.getpid()} {epoch}\n")

    def __getitem__(self, index):
        died = self.folder / "died"
        if (self.epoch, index) == self.dies and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        image = np.random.default_rng([self.epoch, index]).random((3, 8, 8), dtype=np.float32)
        return {"image": torch.from_numpy(image) + index % 2, "label": index % 2}


def train_small(folder, dies=None):
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(288, 2),
    )
    model = nn.Sequential(*layers)

    def loss(logits, batch):
        return cross_entropy(logits, batch["label"])

    folder.mkdir(exist_ok=True)
    options = {"batch_size": 4, "checkpoint_every": 2, "seed": 1, "device": "cpu"}
    history = fit(model, Noise(folder, dies), loss, epochs=4, folder=folder, **options)
    save_weights(model, folder / "weights.safetensors")
    return {
        "files": [str(folder / "weights.safetensors")],
        "loss": history["loss"].iloc[-1],
        "pid": os.getpid(),
    }


def dies_always():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def two_machines(monkeypatch_module):
    """A Ray cluster of two nodes with one core each, on this machine."""
    own = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in own.items():
        monkeypatch_module.setenv(name, value)
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    node = {"num_cpus": 1, "object_store_memory": graph.OBJECT_STORE}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(cluster.address)
    for module in (
        sys.modules[__name__],
        graph,
    ):  # so that a worker imports what its task uses, not all of whalelib
        ray.cloudpickle.register_pickle_by_value(module)
    yield ray
    ray.shutdown()
    cluster.shutdown()


def test_a_worker_killed_in_mid_run_loses_nothing(two_machines, places):
    straight, killed = places / "straight", places / "killed"
    tasks = [
        Task("straight", partial(train_small, straight)),
        Task("killed", partial(train_small, killed, dies=(2, 7))),
        Task("after", partial(work, [], "after", {}), ("killed",)),
        Task("fails", partial(work, [], "fails", {}, "fails")),
        Task("skipped", partial(work, [], "skipped", {}), ("fails", "straight")),
    ]
    outcomes = {one.name: one for one in execute(tasks, graph.Ray(retries=1))}
    assert states(outcomes.values()) == {
        **{"straight": "done", "killed": "done", "after": "done"},
        **{"fails": "failed", "skipped": "skipped"},
    }
    assert outcomes["fails"].error == "RuntimeError: fails went wrong"

    epochs = [line.split() for line in (killed / "epochs.txt").read_text().splitlines()]
    pids = list(dict.fromkeys(pid for pid, _ in epochs))
    assert len(pids) == 2
    assert int(pids[1]) == outcomes["killed"].result["pid"] != os.getpid()
    assert [epoch for pid, epoch in epochs if pid == pids[1]] == ["2", "3"]  # not from the beginning
    assert outcomes["killed"].result["loss"] == outcomes["straight"].result["loss"]
    one, other = ((folder / "weights.safetensors").read_bytes() for folder in (straight, killed))
    assert one == other

    again = execute(tasks[:3], graph.Ray(retries=1))
    assert set(states(again).values()) == {"kept"}


def test_a_worker_that_is_always_killed_is_given_up(two_machines, places):
    (lost,) = execute([Task("lost", dies_always)], graph.Ray(retries=0))
    assert lost.state == "failed"
    assert "Crashed" in lost.error


def meets_another(folder):
    import ray  # noqa: PLC0415

    node = ray.get_runtime_context().get_node_id()
    folder.mkdir(exist_ok=True)
    (folder / node).touch()
    until(lambda: len(list(folder.iterdir())) == 2, seconds=120)
    return {"node": node}


def test_both_machines_work_at_the_same_time(two_machines, places):
    tasks = [Task(name, partial(meets_another, places / "nodes")) for name in "ab"]
    found = execute(tasks, graph.Ray())
    assert states(found) == {"a": "done", "b": "done"}
    assert len({one.result["node"] for one in found}) == 2
