"""Every recipe learns its toy task, full, LoRA and QLoRA; and the page of the methods says so."""

import pytest
from methods import KINDS, PAGE, methods, movement, page, read_method, recipes, train


def test_every_recipe_has_a_file_here_and_a_golden_trace():
    assert methods() == recipes()
    assert all(read_method(name).trace.is_file() for name in methods())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", methods())
def test_a_method_learns_its_toy_task(name, kind, toy_files, tmp_path):
    if kind == "qlora":
        pytest.importorskip("bitsandbytes")
    method = read_method(name)
    lines = train(method, files=toy_files, output_dir=tmp_path / "run", kind=kind)
    first, last = movement(lines, metric=method.metric, window=method.window)
    print(f"{name} {kind}: {method.metric} from {first:.4g} to {last:.4g}")
    moved = (last - first) * (1 if method.rises_by > 0 else -1)
    assert moved >= abs(method.rises_by), f"{method.metric} went from {first:.4g} to {last:.4g}"


def test_movement_compares_the_two_ends():
    lines = [{"step": i, "train/loss": float(i)} for i in range(1, 11)] + [{"step": 11, "eval/loss": 0.0}]
    assert movement(lines, metric="train/loss", window=2) == (1.5, 9.5)
    with pytest.raises(AssertionError, match="less than"):
        movement(lines, metric="eval/loss", window=1)


def test_the_page_of_the_methods_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/methods/make_page.py"
