"""Files that are there whole or not at all, and folders that one process holds at a time."""

import fcntl
import os

import pytest

from whalelib.files import locked, replacing


def test_processes_of_one_number_on_two_machines_write_beside_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "kept.txt"
    with replacing(path) as one, replacing(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"
    assert [*tmp_path.iterdir()] == [path]


def test_what_is_locked_is_a_file(tmp_path):
    file = tmp_path / "new" / ".lock"
    with locked(file.parent), file.open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(file.parent):
        pass


def test_a_folder_that_can_only_be_read_needs_no_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *_: False)
    with locked(tmp_path):
        assert not [*tmp_path.iterdir()]
