"""Compiling the kernels: once, safely, and with a reason where it cannot be done."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kitae import compiler
from kitae.rollout import build


def fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "fake-g++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_second_call_takes_what_the_first_compiled(kernels, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(compiler, "compile_kernels", refuse)
    assert build.load_kernels().kitae_decode
    assert list(compiler.default_cache().glob("*.so"))


def test_a_damaged_file_is_made_anew(kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (good,) = (Path(kernels._name),)
    damaged = tmp_path / good.name
    damaged.write_bytes(good.read_bytes()[:1000])
    damaged.with_suffix(".checksum").write_text(good.with_suffix(".checksum").read_text())
    monkeypatch.setattr(compiler, "compile_kernels", lambda file, **_: file.write_bytes(good.read_bytes()))
    assert build.load_kernels(cache=tmp_path).kitae_decode
    assert damaged.read_bytes() == good.read_bytes()


def test_two_processes_at_once_compile_once(kernels, tmp_path: Path):
    """The compiler is a script that counts its calls and hands out the file of the fixture."""
    calls = tmp_path / "calls"
    script = (
        f'case "$*" in *--version*) echo 1; exit 0;; esac\necho "$$" >> {calls}\nsleep 0.3\n'
        f'while [ "$1" != -o ]; do shift; done\ncp {kernels._name} "$2"'
    )
    code = "import sys; from pathlib import Path; from kitae.rollout.build import load_kernels\n"
    code += "load_kernels(cache=Path(sys.argv[1]))"
    env = os.environ | {"CXX": str(fake_compiler(tmp_path, script))}
    both = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=env) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert len(calls.read_text().split()) == 2  # to compile and to link


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (
            'case "$*" in *--version*) exit 0;; esac\necho "engine.cpp:1: error: no such thing" >&2; exit 1',
            "no such thing",
        ),
        (
            "printf 'Version \\344'\ncase \"$*\" in *--version*) exit 0;; esac\n"
            "printf 'engine.cpp:1: error: \\344 in another encoding' >&2; exit 1",
            "in another encoding",
        ),
        (
            'case "$*" in *--version*) exit 0;; esac\nwhile [ "$1" != -o ]; do shift; done\necho x > "$2"',
            "cannot be loaded",
        ),
    ],
    ids=["refuses", "says it in another encoding", "makes nonsense"],
)
def test_a_compiler_that_fails_is_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
):
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, script)))
    with pytest.raises(build.BuildError, match=reason):
        build.load_kernels(cache=tmp_path / "cache")


def test_no_compiler_and_no_place_to_write_are_reasons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CXX", str(fake_compiler(tmp_path, "echo 1")))
    with pytest.raises(build.BuildError, match="cannot be written"):
        build.load_kernels(cache=tmp_path / "file" / "cache")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler \(g\+\+ or c\+\+\)"):
        build.load_kernels(cache=tmp_path)


def test_the_file_depends_on_cpu_compiler_and_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = str(fake_compiler(tmp_path, "echo version 1"))
    found = {compiler.fingerprint(build.SOURCE, wanted, "libgomp.so.1")}
    monkeypatch.setattr(compiler, "cpu_features", lambda: "flags: another")
    found.add(compiler.fingerprint(build.SOURCE, wanted, "libgomp.so.1"))
    fake_compiler(tmp_path, "echo version 2")
    found.add(compiler.fingerprint(build.SOURCE, wanted, "libgomp.so.1"))
    (tmp_path / "engine.cpp").write_text("// other")
    other = replace(build.SOURCE, main=tmp_path / "engine.cpp")
    found.add(compiler.fingerprint(other, wanted, "libgomp.so.1"))
    (tmp_path / "more.h").write_text("// more")
    found.add(compiler.fingerprint(replace(other, folders=[tmp_path]), wanted, "libgomp.so.1"))
    assert len(found) == 5


def test_only_torchs_own_openmp_is_loaded(kernels):
    assert compiler.openmp_runtime()  # raises where there are two
