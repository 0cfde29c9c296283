"""Trainings for ``test_faults`` to disturb: imports once, then forks a child, or several, for each line read.

A line is a JSON object, the arguments of ``attempt``; the answer is a line too, what that returned.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # what the first step would import, in every child anew
from test_train import Noise, adam, linear, plain_loss, run

from whalelib import train
from whalelib.data import open_catalog
from whalelib.data.photographs import Photographs
from whalelib.losses import euclidean, triplet

EPOCHS, STEPS = 6, 8
SCORES = [1, 2, 5, 3, 4, 0]  # the third epoch is the best


def attempt(work, folder, kill=None, processes=1, **options):
    """Do the work in children; returns their exit codes and all they said.

    kill: (position, seconds): SIGKILL so long after a step at this position in epochs, or a later one, began.
    """
    reading, writing = os.pipe()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        children.append(os.fork())
        if not children[-1]:
            if processes > 1:
                os.environ |= places(rank, processes, port)
            os._exit(child(WORKS[work], Path(folder), writing, options))
    os.close(writing)
    said = []
    with os.fdopen(reading) as lines:
        for line in lines:
            said.append(json.loads(line))
            if kill and said[-1].get("at", -1) >= kill[0]:
                time.sleep(kill[1])
                os.kill(children[0], signal.SIGKILL)
                kill = None
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "said": said}


def places(rank, processes, port):
    """What torchrun tells its processes."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": processes, "MASTER_PORT": port}
    told |= {"LOCAL_WORLD_SIZE": processes, "GROUP_WORLD_SIZE": 1, "TORCHELASTIC_RUN_ID": "faults"}
    return {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"}


def child(work, folder, pipe, options):
    def say(**what):
        os.write(pipe, f"{json.dumps(what)}\n".encode())

    try:
        work(folder, say, **options)
    except Exception as error:
        say(error=type(error).__name__, message=str(error))
        return 1
    except BaseException:
        traceback.print_exc()
        return 2
    return 0


def training(folder, say, room=None):
    """Train slowly, saying where it is.

    room: (position, bytes): no file may grow larger from this position on.
    """

    def schedule(at):
        if room and at >= room[0]:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (room[1], hard))  # Python ignores SIGXFSZ
        say(at=at)
        time.sleep(0.01)
        return 1 / (1 + at)

    for name in ("save", "save_best", "save_snapshot"):
        told(train.Checkpoints, name, say)
    for place, name in [(train, "_write_tensors"), (os, "replace"), (shutil, "rmtree"), (shutil, "copytree")]:
        slow(place, name)
    run(
        folder,
        EPOCHS,
        accumulate=2,
        checkpoint_every=2,
        schedule=schedule,
        snapshots=(1, 2),
        on_epoch=lambda model, row: {"score": SCORES[row["epoch"] - 1]},
        best="score",
        settings={"note": "a long one" * 2000},  # state.json is the largest file
    )


def told(place, name, say):
    function = getattr(place, name)

    def wrapped(*arguments):
        say(writing=name)
        function(*arguments)
        say(writing=None)

    setattr(place, name, wrapped)


def slow(place, name):
    function = getattr(place, name)

    def wrapped(*arguments, **options):
        time.sleep(0.002)
        found = function(*arguments, **options)
        time.sleep(0.002)
        return found

    setattr(place, name, wrapped)


def shared(folder, say, sampler=None):
    """Train with a loss that compares images, saying which images each process reads."""

    class Told(Noise):
        def __getitem__(self, index):
            say(rank=int(os.environ.get("RANK", "0")), image=index)
            return super().__getitem__(index)

    def loss(logits, batch):
        apart = triplet(euclidean(logits), batch["label"], new=-1)
        return {"loss": plain_loss(logits, batch)["loss"] + apart, "triplet": apart}

    run(folder, 2, model=linear(), loss=loss, dataset=Told(), optimizer=adam, sampler=sampler)


def kept(folder, say):
    """Train to the best weights and keep them as the recipes do, on a disk that is slow."""
    from whalelib.recipes import first  # noqa: PLC0415 - of all the trainings this one alone takes it

    rank, write, model = os.environ["RANK"], train._write_tensors, linear()

    def writes(tensors, path):
        time.sleep(0.2)
        say(rank=rank, wrote=path.name)
        write(tensors, path)

    def trains():
        _, history = run(folder, 1, model=model, best="right")
        train.load_best(model, adam(model), folder)
        return history

    train._write_tensors = writes
    first.trained_or_kept(model, folder, trains)
    say(rank=rank, sum=model[1].weight.sum().item())


def pixels(folder, say, animals):
    """Keep decoded photographs of 147 kB on a disk of 64, which only this process has."""
    folder.mkdir()
    say(mounted=mounted(folder, b"size=64k"))
    try:
        Photographs(open_catalog(animals), (64, 64), folder=folder)
    finally:
        say(left=[path.name for path in folder.glob("[!.]*")])


def mounted(folder, options):
    """Mount a file system in memory for this process alone; returns whether that is allowed."""
    new_user, new_mounts, recursive, private = 0x10000000, 0x20000, 0x4000, 1 << 18
    libc, user, group = ctypes.CDLL(None), os.getuid(), os.getgid()
    if libc.unshare(new_mounts | (new_user if user else 0)):
        return False
    if user:
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    if libc.mount(b"none", b"/", None, recursive | private, None):
        return False
    return not libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, options)


WORKS = {"training": training, "shared": shared, "kept": kept, "pixels": pixels}


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(attempt(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
