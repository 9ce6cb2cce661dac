"""Checkpoints: what goes in comes out to the last bit, and a name means a whole checkpoint."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from kitae.errors import CheckpointError, RunDirError
from kitae.parallel.world import World
from kitae.train import checkpoint
from kitae.train.checkpoint import load_newest, pack, prune, read, save, set_aside, steps_in, sweep, unpack

WORLD = World()


def put(folder: Path, step: int, **state) -> Path:
    return save(folder, step=step, state=state, identity={"settings": {}}, world=WORLD)


def assert_same(one, other) -> None:
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        raw = [
            t.contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else [] for t in (one, other)
        ]
        assert raw[0] == raw[1]
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, float) and math.isnan(one):
        assert isinstance(other, float) and math.isnan(other)
    else:
        assert type(one) is type(other) and one == other
        assert not isinstance(one, float) or one.hex() == other.hex()


def test_tensors_of_every_type_and_shape_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {
        "weights": {str(dtype): torch.randn(3, 5).to(dtype) for dtype in checkpoint.DTYPES},
        "scalar": torch.tensor(1.25, dtype=torch.bfloat16),
        "empty": torch.empty(0, 4),
        "transposed": torch.randn(4, 6).T,
        "slice": torch.randn(10, 10)[2:5, ::2],
        "odd": [torch.tensor([float("nan"), -0.0, float("inf")]), {"deep": torch.ones(1, dtype=torch.bool)}],
    }
    put(tmp_path, 7, **state)
    assert_same(state, read(tmp_path / "step_000007", rank=0).state)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text().filter(lambda s: s[:1] != "$"), inner, max_size=4)
    ),
    max_leaves=20,
)


@given(st.dictionaries(st.text().filter(lambda s: s[:1] != "$"), JSON, max_size=4))
@settings(max_examples=80, deadline=None)
def test_json_values_come_back_to_the_last_bit(state: dict) -> None:
    skeleton, tensors = pack(state)
    json.loads(skeleton, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert_same(state, unpack(skeleton, tensors))


@pytest.mark.parametrize("value", [{1: 2}, {"$tensor": 1}, np.float32(1), b"bytes", {"a": {2, 3}}, object()])
def test_what_json_cannot_hold_is_refused_with_its_place(value) -> None:
    with pytest.raises(TypeError, match="state/part"):
        pack({"part": value})


def test_the_tensor_file_is_plain_safetensors(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).view(2, 3)
    path = put(tmp_path, 1, model={"w": tensor})
    assert load_file(path / "rank_000.safetensors")["/model/w"].tolist() == tensor.tolist()


def test_the_newest_is_chosen_by_number_and_not_by_date(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        put(tmp_path, step, value=step)
    os.utime(tmp_path / "step_000100", (0, 0))
    assert steps_in(tmp_path) == [100, 20, 9]
    loaded, skipped = load_newest(tmp_path, world=WORLD)
    assert loaded is not None and loaded.state == {"value": 100} and skipped == []


def test_a_million_steps_sort_behind_999999(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        put(tmp_path, step, value=step)
    assert steps_in(tmp_path) == [1_000_000, 999_999]


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step_000001").mkdir()
    (tmp_path / "notes").mkdir()
    assert load_newest(tmp_path, world=WORLD) == (None, [])
    assert load_newest(tmp_path / "absent", world=WORLD) == (None, [])


def test_a_folder_under_a_checkpoints_name_without_manifest_is_none(tmp_path: Path) -> None:
    (tmp_path / "step_000005").mkdir()
    with pytest.raises(CheckpointError, match=r"step_000005: manifest\.json: No such file"):
        load_newest(tmp_path, world=WORLD)


def test_another_format_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", 99)
    path = put(tmp_path, 1, a=1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format 99 was written by another version"):
        read(path, rank=0)


def test_retention_keeps_the_newest_and_the_pinned(tmp_path: Path) -> None:
    for step in range(1, 7):
        put(tmp_path, step)
    prune(tmp_path, keep=2, pinned=[3])
    assert steps_in(tmp_path) == [6, 5, 3]
    prune(tmp_path, keep=1)
    assert steps_in(tmp_path) == [6]


def test_leftovers_of_a_kill_are_swept(tmp_path: Path) -> None:
    put(tmp_path, 1)
    for name in (".tmp-step_000002", ".del-step_000000"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rank_000.json").write_text("{")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step_000001"]


def test_a_step_is_written_anew_over_an_old_and_a_half_written_one(tmp_path: Path) -> None:
    put(tmp_path, 4, value=1)
    (tmp_path / ".tmp-step_000004").mkdir()
    (tmp_path / ".tmp-step_000004" / "rank_000.json").write_text("half")
    put(tmp_path, 4, value=2)
    assert read(tmp_path / "step_000004", rank=0).state == {"value": 2}
    assert os.listdir(tmp_path) == ["step_000004"]


def test_damaged_newer_ones_do_not_count_any_more(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        put(tmp_path, step)
    set_aside(tmp_path, newer_than=1)
    assert steps_in(tmp_path) == [1]
    assert (tmp_path / "damaged-step_000003").is_dir()


def test_too_little_space_is_refused_before_a_byte_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda path: 50_000)
    with pytest.raises(
        RunDirError, match=r"step 2 not written: disk full: need 39[0-9.]+ KiB, have 48.8 KiB"
    ):
        put(tmp_path, 2, big=torch.zeros(100_000))
    assert os.listdir(tmp_path) == ["step_000001"]
    with pytest.raises(
        RunDirError, match=r"disk too small: need 9[0-9.]+ KiB for checkpoints, have 48.8 KiB"
    ):
        checkpoint.require_space(tmp_path, {"w": torch.zeros(10_000)}, world=WORLD)
    checkpoint.require_space(tmp_path, {"w": torch.zeros(1_000)}, world=WORLD)


def test_random_generators_go_on_where_they_were() -> None:
    def draw() -> list:
        return [random.random(), random.gauss(0, 1), *np.random.randn(3), *torch.rand(3).tolist()]

    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    draw()  # leaves a second gaussian waiting in Python's and NumPy's generator
    skeleton, tensors = pack(checkpoint.random_state(WORLD.device))
    expected = draw() + draw()
    draw()
    checkpoint.restore_random_state(unpack(skeleton, tensors), device=WORLD.device)
    assert draw() + draw() == expected
