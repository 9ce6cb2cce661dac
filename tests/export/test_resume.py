"""An export killed at any instant goes on to the same bytes; a folder is a model only when it is whole."""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from kitae.errors import LockedError, ModelError, RunDirError
from kitae.export import shards
from kitae.export.convert import How, bf16_to_fp8, fp8_to_bf16
from kitae.train.folder import Lock
from tests.export.conftest import QUANTIZATION, random_fp8, write_model

CODE = (
    "import sys; from pathlib import Path; from kitae.export import convert, shards\n"
    "import time; say = lambda _: (print('.', flush=True), time.sleep(0.01))\n"
    "convert.fp8_to_bf16(sys.argv[1], convert.How(output=Path(sys.argv[2]), num_workers=2),\n"
    "    progress=shards.Progress(say=say))"
)


@pytest.fixture
def many_files(tmp_path):
    tensors = {}
    for i in range(24):
        name = f"model.layers.{i}.mlp.up_proj.weight"
        tensors[name], tensors[f"{name}_scale_inv"] = random_fp8(256, 512, seed=i)
    config = {"model_type": "deepseek_v3", "quantization_config": QUANTIZATION}
    return write_model(tmp_path / "in", tensors, shards=12, config=config)


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != shards.MANIFEST}


def test_killed_at_any_instant_the_same_command_goes_on_to_the_same_bytes(many_files, tmp_path):
    fp8_to_bf16(str(many_files), How(output=tmp_path / "whole"))
    output, partial = tmp_path / "out", tmp_path / "out.partial"
    chance, kills, lives = random.Random(0), 0, 0
    while kills < 2 and lives < 20:  # a busy machine may be too late for a kill
        lives += 1
        if output.exists():
            shutil.rmtree(output)
        process = subprocess.Popen([sys.executable, "-c", CODE, many_files, output], stdout=subprocess.PIPE)
        for _ in range(chance.randint(1, 20)):
            process.stdout.readline()
        time.sleep(chance.random() * 0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        assert output.exists() != partial.exists()
        if partial.exists():
            known = json.loads((partial / shards.MANIFEST).read_text())["shards"]
            assert all((partial / name).is_file() for name in known)
    assert kills == 2
    fp8_to_bf16(str(many_files), How(output=output))
    assert contents(output) == contents(tmp_path / "whole")
    assert not partial.exists()


def killed_before_call(number, action):
    """Run `action` in a forked process that dies, as by kill -9, at its call number so-and-so to the disk."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1] == signal.SIGKILL
    left = itertools.count(number - 1, -1)

    def deadly(real):
        def call(*args, **kwargs):
            if next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call

    for name in ("write", "pwrite", "fsync", "rename", "unlink"):
        setattr(os, name, deadly(getattr(os, name)))
    try:
        action()
    finally:
        os._exit(0)


def test_killed_before_every_third_call_to_the_disk_it_goes_on_to_the_same_bytes(fp8_model, tmp_path):
    fp8_to_bf16(str(fp8_model), How(output=tmp_path / "whole"))
    whole = contents(tmp_path / "whole")
    output = tmp_path / "out"
    how = How(output=output, num_workers=1)
    for number in itertools.count(1, 3):
        was_killed = killed_before_call(number, lambda: fp8_to_bf16(str(fp8_model), how))
        if output.exists():
            assert contents(output).keys() - {"lock"} == whole.keys()
        fp8_to_bf16(str(fp8_model), how)
        assert contents(output) == whole, number
        shutil.rmtree(output)
        assert not (tmp_path / "out.partial").exists()
        if not was_killed:
            break
    assert number > 40


def stopped_after(count, many_files, output, monkeypatch, *, overwrite=False):
    """Let the disk fail while shard number `count` + 1 is renamed."""
    done = []

    def rename(source, target):
        if str(target).endswith(".safetensors"):
            if len(done) == count:
                raise OSError(28, "No space left on device", str(target))
            done.append(target)
        real(source, target)

    real = shards.os.rename
    monkeypatch.setattr(shards.os, "rename", rename)
    monkeypatch.setattr(shards, "IN_FLIGHT", 1)
    with pytest.raises(RunDirError, match=r"disk full .* then give the same command again"):
        fp8_to_bf16(str(many_files), How(output=output, overwrite=overwrite))
    monkeypatch.undo()


def test_a_full_disk_half_way_leaves_nothing_under_the_final_name_and_is_gone_on_with(
    many_files, tmp_path, monkeypatch
):
    fp8_to_bf16(str(many_files), How(output=tmp_path / "whole"))
    output = tmp_path / "out"
    stopped_after(5, many_files, output, monkeypatch)
    assert not output.exists() and not list((tmp_path / "out.partial").glob(".tmp-*"))
    finished = sorted((tmp_path / "out.partial").glob("model-*.safetensors"))
    before = {path.name: path.stat().st_ino for path in finished}
    assert len(before) == 5
    fp8_to_bf16(str(many_files), How(output=output))
    assert contents(output) == contents(tmp_path / "whole")
    assert all((output / name).stat().st_ino == inode for name, inode in before.items())


def test_a_finished_shard_that_the_disk_damaged_is_written_again(many_files, tmp_path, monkeypatch):
    fp8_to_bf16(str(many_files), How(output=tmp_path / "whole"))
    stopped_after(5, many_files, tmp_path / "out", monkeypatch)
    damaged = min((tmp_path / "out.partial").glob("model-*.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    fp8_to_bf16(str(many_files), How(output=tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_same_command_on_a_finished_export_checks_it_and_mends_it(many_files, tmp_path):
    output = tmp_path / "out"
    first = fp8_to_bf16(str(many_files), How(output=output))
    before = contents(output)
    damaged = min(output.glob("model-*.safetensors"))
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert fp8_to_bf16(str(many_files), How(output=output)) == first
    assert contents(output) == before


def test_half_of_another_export_is_refused_until_it_is_to_be_overwritten(many_files, tmp_path, monkeypatch):
    output = tmp_path / "out"
    stopped_after(2, many_files, output, monkeypatch)
    file = min(many_files.glob("model-*.safetensors"))
    file.touch()  # the source was written anew
    with pytest.raises(RunDirError, match="holds half of another export"):
        fp8_to_bf16(str(many_files), How(output=output))
    stopped_after(2, many_files, output, monkeypatch, overwrite=True)
    inodes = {p.name: p.stat().st_ino for p in (tmp_path / "out.partial").glob("model-*.safetensors")}
    fp8_to_bf16(str(many_files), How(output=output, overwrite=True))
    assert len(inodes) == 2  # the same command with --overwrite goes on too
    assert all((output / name).stat().st_ino == inode for name, inode in inodes.items())


def test_what_is_there_is_replaced_only_when_told_and_only_if_it_is_a_model(many_files, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "thesis.txt").write_text("years of work")
    with pytest.raises(RunDirError, match="is not empty; choose another folder, or say --overwrite"):
        fp8_to_bf16(str(many_files), How(output=output))
    with pytest.raises(RunDirError, match="is no model folder, so it is not overwritten"):
        fp8_to_bf16(str(many_files), How(output=output, overwrite=True))
    assert (output / "thesis.txt").read_text() == "years of work"
    (output / "config.json").write_text("{}")
    fp8_to_bf16(str(many_files), How(output=output, overwrite=True))
    assert not (output / "thesis.txt").exists() and (output / "model.safetensors.index.json").is_file()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_the_source_is_never_the_output(many_files, tmp_path):
    for output in (many_files, tmp_path):
        with pytest.raises(RunDirError, match="which is read; choose another folder"):
            fp8_to_bf16(str(many_files), How(output=output, overwrite=True))


def test_two_processes_do_not_write_the_same_export(many_files, tmp_path):
    (tmp_path / "out.partial").mkdir()
    lock = Lock(tmp_path / "out.partial" / "lock")
    with pytest.raises(LockedError, match="in use by process"):
        fp8_to_bf16(str(many_files), How(output=tmp_path / "out"))
    lock.release()
    fp8_to_bf16(str(many_files), How(output=tmp_path / "out"))


def test_other_settings_are_another_export(tmp_path, monkeypatch):
    tensors = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 4).bfloat16()}
    folder = write_model(tmp_path / "in", tensors)
    bf16_to_fp8(str(folder), How(output=tmp_path / "out"))
    with pytest.raises(RunDirError, match="is not empty"):
        bf16_to_fp8(str(folder), How(output=tmp_path / "out"), scale_format="ue8m0")


def test_an_export_that_failed_before_its_first_file_does_not_stand_in_the_way(tmp_path):
    name = "model.layers.0.mlp.up_proj.weight"
    folder = write_model(tmp_path / "in", {name: torch.full((4, 4), float("nan")).bfloat16()})
    with pytest.raises(ModelError, match="NaN or infinite"):
        bf16_to_fp8(str(folder), How(output=tmp_path / "out"))
    write_model(tmp_path / "in", {name: torch.ones(4, 4).bfloat16()})  # downloaded again
    bf16_to_fp8(str(folder), How(output=tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
