"""Files are whole or absent, and a folder has one writer."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from hybrid import files
from hybrid.convert.checkpoint import new_folder
from hybrid.locks import FolderInUse, sole_writer


def writers():
    return {
        "text": lambda path: files.write_text(path, "word " * 5000),
        "bytes": lambda path: files.write_bytes(path, bytes(20000)),
        "json": lambda path: files.write_json(path, ["word"] * 5000),
        "array": lambda path: files.write_array(path, np.arange(5000)),
    }


def test_a_file_that_the_disk_has_no_room_for_is_an_error_and_leaves_the_old_one(tmp_path):
    for kind in writers():
        (tmp_path / kind).write_bytes(b"old")
    code = f"""
        import resource, signal, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        from test_files import writers
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # write() then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
        for kind, write in writers().items():
            try:
                write(Path({str(tmp_path)!r}, kind))
            except OSError as error:
                print(kind, error.errno)
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert ended.stdout.split("\n")[:-1] == [f"{kind} {errno.EFBIG}" for kind in writers()]
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == dict.fromkeys(writers(), b"old")


def test_what_was_written_is_what_is_read(tmp_path):
    array = np.arange(10, dtype=np.uint16)[::2]
    files.write_array(tmp_path / "a.npy", array)
    assert np.array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), array)
    files.write_json(tmp_path / "a.json", {"a": [1, None]})
    assert files.read_json(tmp_path / "a.json") == {"a": [1, None]}


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    order = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append(("sync", os.fstat(fd).st_ino)), sync(fd))
    )

    def renamed(old, new):
        order.append(("name", os.stat(old).st_ino))
        replace(old, new)

    monkeypatch.setattr(os, "replace", renamed)
    files.write_text(tmp_path / "a", "text")
    inode = (tmp_path / "a").stat().st_ino
    assert order == [("sync", inode), ("name", inode), ("sync", tmp_path.stat().st_ino)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "expected valid JSON, got too many levels of nesting"),
        ("[]", "expected a JSON object, got list"),
        ("{", "expected valid JSON"),
        (None, "expected an existing file"),
    ],
)
def test_json_of_another_shape_is_named(tmp_path, text, words):
    path = tmp_path / "x.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=f"x.json: {words}"):
        files.read_json(path)


@pytest.mark.parametrize("present", [False, True])
def test_a_new_folder_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch, present):
    """Of imports, exports and students of a distillation, whatever code wrote the files."""
    out, seen = tmp_path / "out", []
    if present:
        out.mkdir()

    def fsync(descriptor):
        seen.append((os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")), named()))

    def named():
        return (out / "w").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    with new_folder(out) as made:
        (made / "w").write_text("weights")
        (made / "sub").mkdir()
        (made / "sub" / "x").write_text("more")
    assert {("w", False), ("sub", False), ("x", False), (made.name, False)} <= set(seen)
    # and then the folder in which the names have changed
    assert seen[-1] == ((out if present else tmp_path).name, True)


def test_a_new_folder_that_does_not_reach_the_disk_is_none(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"), new_folder(tmp_path / "out") as made:
        (made / "w").write_text("weights")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_use_names_the_other_process(tmp_path):
    words = f"in use by process {os.getpid()} on"
    with sole_writer(tmp_path), pytest.raises(FolderInUse, match=words), sole_writer(tmp_path):
        raise AssertionError
    with sole_writer(tmp_path):  # and is free again
        pass


def test_a_new_folder_in_which_nothing_was_written_is_gone(tmp_path):
    with sole_writer(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a" / "b").exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = f"""
        import time
        from hybrid.locks import sole_writer
        with sole_writer({str(tmp_path)!r}):
            print("in", flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(FolderInUse, match=f"process {other.pid} "), sole_writer(tmp_path):
            raise AssertionError
        other.send_signal(signal.SIGKILL)
        other.wait()
    assert json.loads((tmp_path / ".lock.json").read_text())["pid"] == other.pid  # left behind
    with sole_writer(tmp_path):
        pass


def test_prepared_data_has_one_writer(tmp_path):
    from hybrid.data import prepare

    (tmp_path / "a.txt").write_text("some text")
    with sole_writer(tmp_path / "out"), pytest.raises(FolderInUse):
        prepare(str(tmp_path / "a.txt"), tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()
