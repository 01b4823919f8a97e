"""Files that appear whole or not at all, and locks that a killed program does not keep."""

import subprocess
import sys

import pytest

from glmlab.core.files import file_lock, write_atomically
from glmlab.core.resources import cache_folder


def test_a_file_is_replaced_whole_or_stays(tmp_path):
    path = tmp_path / "values.json"
    write_atomically(path, "第一\n")
    with pytest.raises(TypeError):
        write_atomically(path, 3)
    assert path.read_bytes() == "第一\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_is_refused_while_held_and_leaves_nothing(tmp_path):
    path = tmp_path / "chat.csv"
    with (
        file_lock(path),
        pytest.raises(BlockingIOError, match=r"chat.csv is in use by another program"),
        file_lock(path),
    ):
        pass
    with file_lock(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_killed_program_holds_no_lock(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from glmlab.core.files import file_lock\n"
        "with file_lock(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path / "chat.csv")], check=False).returncode == 9
    with file_lock(tmp_path / "chat.csv"):
        pass


def test_the_cache_folder_is_the_users_unless_named(tmp_path, monkeypatch):
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("GLMLAB_CACHE")
    assert cache_folder().parts[-1] in ("glmlab", "Cache")
