"""Files of a cache that processes of several containers share, in each of which they are number 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from specpool.paths import making_directory, replacing, write_atomically

# A compiler that ends only once another one is at its end, too: both have written their output by then.
COMPILER = """#!/bin/sh
c++ "$@" || exit 1
touch "$MEETING/$$"
tries=0
while [ "$(ls "$MEETING" | wc -l)" -lt 2 ] && [ $tries -lt 600 ]; do sleep 0.1; tries=$((tries + 1)); done
"""
PROCESS = """
import os
os.getpid = lambda: 1
from specpool_engine.modeling.cpu import native
native.load_library("paged_attention")
"""


def test_two_processes_with_one_number_compile_the_same_kernel_at_once(tmp_path: Path) -> None:
    compiler, meeting = tmp_path / "compiler", tmp_path / "meeting"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    meeting.mkdir()
    environment = os.environ | {
        "CXX": str(compiler),
        "MEETING": str(meeting),
        "SPECPOOL_CACHE": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, "-c", PROCESS]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert len(list(meeting.iterdir())) == 2, "both compiled"
    (library,) = (tmp_path / "cache" / "compiled").iterdir()
    assert library.suffix == ".so"


def test_writers_of_one_file_do_not_meet_even_with_one_process_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    path = tmp_path / "new" / "file"
    with replacing(path) as first, replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
        assert first.parent == second.parent == path.parent, "a rename between file systems would be a copy"
    assert path.read_text() == "first", "the inner one ended before"
    write_atomically(path, "third")
    assert path.read_text() == "third"
    assert list(path.parent.iterdir()) == [path]


def test_what_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_first_complete_directory_stays(tmp_path: Path) -> None:
    path = tmp_path / "model"
    with making_directory(path) as slow:
        (slow / "config").write_text("slow")
        with making_directory(path) as fast:
            (fast / "config").write_text("fast")
    assert (path / "config").read_text() == "fast"
    with pytest.raises(FileNotFoundError), making_directory(tmp_path / "other") as partial:
        (partial / "missing" / "config").write_text("half")
    assert list(tmp_path.iterdir()) == [path]
