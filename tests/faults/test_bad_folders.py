"""Output directories that cannot work are refused in one line before anything is loaded."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from fault_server import Server

from kitae.errors import KitaeError, RunDirError
from kitae.train.run import Run


def a_file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


def below_a_file(folder: Path) -> Path:
    return a_file(folder) / "run"


def too_long(folder: Path) -> Path:
    return folder / ("x" * 300)


def a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to(folder / "loop")
    return folder / "loop"


def a_null_byte(folder: Path) -> Path:
    return folder / "a\0b"


def somebodys_folder(folder: Path) -> Path:
    (folder / "thesis.tex").write_text("mine")
    return folder


def a_link_to_nowhere(folder: Path) -> Path:
    (folder / "link").symlink_to("/proc/nothing/here")
    return folder / "link"


CASES = [a_file, below_a_file, too_long, a_loop, a_null_byte, somebodys_folder, a_link_to_nowhere]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("way", [{}, {"resume": True}, {"overwrite": True}])
def test_it_is_refused_and_nothing_is_touched(tmp_path: Path, case, way: dict) -> None:
    path = case(tmp_path)
    before = sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*"))
    with pytest.raises(RunDirError) as caught:
        Run.open(path, config={}, **way)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value) and " choose a" in str(caught.value)
    assert sorted((str(p), p.lstat().st_mtime_ns) for p in tmp_path.rglob("*")) == before


def test_a_read_only_file_system_is_refused(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a read-only disk needs root")
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        with pytest.raises(RunDirError, match="read-only"):
            Run.open(tmp_path / "run", config={})
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.fixture
def readable_place():
    """A folder that a process of another user can reach (pytest's are private)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def as_nobody(action) -> str:
    """What an action says in a process without rights."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        if os.geteuid() == 0:
            os.setgid(65534)
            os.setuid(65534)
        try:
            action()
            text = "no error"
        except KitaeError as error:
            text = f"{error.exit_code} {error}"
        os.write(writer, text.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def test_a_folder_without_write_permission_is_refused(readable_place: Path) -> None:
    readable_place.chmod(0o555)
    new = as_nobody(lambda: Run.open(readable_place / "run", config={}))
    existing = as_nobody(lambda: Run.open(readable_place, config={}))
    for text in (new, existing):
        assert text.startswith("2 output_dir: cannot write") and "you may not write there" in text


def test_a_home_that_cannot_be_written_does_not_stop_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("a file, not a folder")
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))
    with Run.open(tmp_path / "run", config={}):
        pass
    assert "not listed" in (tmp_path / "run" / "train.log").read_text()


def test_a_missing_home_does_not_stop_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("KITAE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with Run.open(tmp_path / "run", config={}):
        pass
    assert "not listed" in (tmp_path / "run" / "train.log").read_text()


def test_a_run_is_listed_in_kitaes_home(server: Server, tmp_path: Path) -> None:
    assert server.run(tmp_path / "run", total=1).code == 0
    pointers = [path.read_text() for path in (server.folder / "home" / "runs").glob("*.json")]
    assert any(str(tmp_path / "run") in text for text in pointers)
