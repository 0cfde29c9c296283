"""Writing files so that nobody ever reads half of one."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` (same suffix), moved over ``path`` when the block succeeds.

    The block makes a file or a folder there. A block that raises, or a process that is killed, leaves ``path`` as
    it was (killed in the moment when a folder takes another's place: no folder).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{os.getpid()}-{path.name}")
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


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder (made when it is missing) while the block runs; another process that asks waits."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
