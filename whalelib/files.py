"""Writing files so that nobody ever reads half of one."""

import fcntl
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` (same suffix), moved over ``path`` when the block succeeds.

    The block makes a file or a folder there. A block that raises, or a process that is killed, leaves ``path`` as
    it was (killed in the moment when a folder takes another's place: no folder).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes on two machines that share the folder may have the same number.
    part = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield part
        if part.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
    except OSError as error:
        if error.errno and not error.filename:  # a disk that is full doesn't say for which file
            error.filename = str(path)
        raise
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def sha256_of(path: Path | str) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder (made when it is missing) while the block runs; another process that asks waits.

    What is locked is the file ``.lock`` in it: network file systems lock no folders. Where nothing can be written,
    there is nothing to wait for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") if os.access(folder, os.W_OK) else nullcontext() as file:
        if file:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def making(path: Path) -> Iterator[bool]:
    """Hold a file's folder while the block trains a network for it, or finds it trained; another process waits.

    Not so those that train one network together (torchrun): they wait for each other, so none may keep the others out.
    The first of them writes the file, and at the end of the block the others wait until it is there.

    Args:
        path: the file.

    Yields:
        Whether this process is to write it.
    """
    first = os.environ.get("RANK", "0") == "0"
    with locked(path.parent) if int(os.environ.get("WORLD_SIZE", "1")) == 1 else nullcontext():
        yield first
        while not (first or path.exists()):
            time.sleep(0.1)
