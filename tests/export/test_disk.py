"""A disk that fills up while an export is written: one line, nothing under the final name, and it goes on later."""

from __future__ import annotations

import subprocess

import pytest

from kitae.cli.main import main
from kitae.export import shards
from tests.export.test_merge import kitae_adapter

pytest.importorskip("gguf")


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs, and a function that gives it another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)

    mounted = mount("-t", "tmpfs", "-o", "size=128k", "tmpfs")
    if mounted.returncode != 0:
        pytest.skip(f"mounting is not allowed here: {mounted.stderr.strip()}")
    yield folder, lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # weights may still be mapped


@pytest.mark.parametrize(
    "command", [["merge"], ["gguf", "--type", "f32"], ["gguf", "--adapter_only", "--type", "f32"]]
)
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    command, small_disk, tiny, tmp_path, monkeypatch, capsys
):
    folder, resize = small_disk
    adapter = kitae_adapter(tiny("llama"), tmp_path / "adapter")
    verb, *rest = command
    asked = ["export", verb, str(adapter), *rest, "--output", str(folder / "out")]
    assert main(asked) == 2 and "disk too small: need" in capsys.readouterr().err
    # The space that another program takes meanwhile.
    monkeypatch.setattr(shards, "free_bytes", lambda _: 1 << 40)
    resize("16k")
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "disk full" in said and "give the same command again" in said and said.count("\n") == 1
    assert not (folder / "out").exists() and not list((folder / "out.partial").glob(".tmp-*"))
    resize("64m")
    assert main(asked) == 0 and (folder / "out").exists() and not (folder / "out.partial").exists()
