"""What the pages say of kitae's speed is what was measured."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import harness  # noqa: E402
import run_all  # noqa: E402
import scaling  # noqa: E402
import tables  # noqa: E402

RATIO = {"median": 4.0, "low": 3.5, "high": 4.25}
BYTES = {"median": 0.5, "low": 0.5, "high": 0.5}
RESULT = {
    "title": "SFT, 5 M parameters",
    "command": "python benchmarks/sft.py",
    "unit": "tokens/s",
    "ours": "kitae",
    "against": {
        "trl": {
            "ours": {"median": 4000.0, "low": 3900.0, "high": 4100.0},
            "theirs": {"median": 1000.0, "low": 990.0, "high": 1010.0},
            "ratio": RATIO,
            "our_memory_mib": {"median": 600.0, "low": 600.0, "high": 600.0},
            "their_memory_mib": {"median": 1200.0, "low": 1200.0, "high": 1200.0},
            "memory_ratio": BYTES,
            "target": 5.5,
            "memory_target": None,
        }
    },
    "floor": {"what": "products alone", "limit": 8000.0, "share": 0.5, "target": 0.6},
    "machine": {"cpu": "A CPU", "cores": 2, "date": "2026-01-01", "packages": {}},
    "versions": {"trl": "1.0"},
    "rounds": 3,
    "seconds": 90.0,
    "other_cores": 0.5,
    "disturbed": True,
}


@pytest.mark.parametrize("page", tables.pages(), ids=lambda page: page.name)
def test_the_tables_of_a_page_are_those_of_the_results(page):
    expected = tables.written(page, tables.read_results())
    assert expected is None or page.read_text(encoding="utf-8") == expected


def test_notes_stand_below_a_table():
    assert tables.of_benchmark({**RESULT, "notes": ["First.", "Second."]}).endswith("\nFirst.\n\nSecond.\n")


def test_the_documentation_has_a_place_for_the_tables():
    assert tables.written(tables.DOCS, {}) is not None


def test_every_result_belongs_to_a_benchmark_and_says_where_it_was_measured():
    for name, result in tables.read_results().items():
        assert name in {benchmark.name for benchmark in run_all.ALL}
        assert result["machine"]["cpu"] and result["machine"]["date"] and result["versions"]
        assert result["rounds"] >= 3, f"{name}: too few rounds to quote"


def test_a_result_becomes_a_table_with_ratio_target_floor_and_disturbance():
    text = tables.of_benchmark(RESULT)
    assert "| **kitae** | 4,000 (3,900-4,100) | 600 (600-600) |" in text
    assert (
        "| trl | 1,000 (990-1,010) | 1,200 (1,200-1,200) | 4.00 (3.50-4.25) | ≥ 5.5 | 0.50 (0.50-0.50) |  |"
        in text
    )
    assert "products alone, 8,000 tokens/s. kitae is at 50%; the target is 60%" in text
    assert "0.50 cores busy" in text


def test_the_short_table_has_the_medians_of_the_ratios():
    text = tables.for_readme({"sft": RESULT}, sentence="Beside others:", headings=("", "speed", "memory"))
    assert text.splitlines()[4:] == ["| SFT, 5 M parameters / trl | 4.0× | 0.50× |"]


def test_results_of_another_machine_or_version_are_measured_anew():
    here = harness.machine()
    assert run_all.is_current({"machine": {**here, "date": "2000-01-01"}})
    assert not run_all.is_current({"machine": {**here, "gpu": "another"}})
    assert not run_all.is_current({"machine": {**here, "cpu": "another"}})
    assert not run_all.is_current({"machine": {**here, "packages": {**here["packages"], "torch": "0"}}})
    assert not run_all.is_current(None)


def test_a_result_from_before_gpus_were_written_down_is_one_of_a_machine_without(monkeypatch):
    monkeypatch.setattr(harness, "gpu", lambda: None)
    before = {key: value for key, value in harness.machine().items() if key != "gpu"}
    assert run_all.is_current({"machine": before})
    monkeypatch.setattr(harness, "gpu", lambda: "a GPU")
    assert not run_all.is_current({"machine": before})


def measured(*speeds):
    return [
        harness.Measurement({"speed": speed}, peak_rss_mib=100 * speed, wall_s=1, other_cores=0)
        for speed in speeds
    ]


def test_ratios_are_taken_round_by_round_and_more_is_better():
    runs = {"kitae": measured(4, 9, 8), "peer": measured(2, 3, 8)}
    faster = harness.compare(runs, key="speed", targets={"peer": (2.0, 0.5)})["peer"]
    assert faster.ratio == harness.Spread(2, 1, 3)
    assert faster.memory_ratio == harness.Spread(2, 1, 3)
    assert (faster.target, faster.memory_target) == (2.0, 0.5)
    assert harness.compare(runs, key="speed", is_time=True)["peer"].ratio == harness.Spread(1 / 2, 1 / 3, 1)


def test_a_driver_run_with_a_stopped_benchmark_keeps_what_was_measured(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results.json"
    found = {**RESULT, "machine": harness.machine()}
    monkeypatch.setattr(run_all, "measure", lambda benchmark, **_: found if benchmark.name == "sft" else None)
    monkeypatch.setattr(sys, "argv", ["run_all.py", "--only", "sft", "dpo", "--results", str(results)])
    with pytest.raises(SystemExit, match="failed: dpo"):
        run_all.main()
    assert json.loads(results.read_text()).keys() == {"sft"}
    with pytest.raises(SystemExit, match="failed: dpo"):
        run_all.main()
    assert "sft: measured on" in capsys.readouterr().out


def test_the_documentation_shows_the_curves_that_were_measured():
    found = json.loads(scaling.NUMBERS.read_text()) if scaling.NUMBERS.exists() else {}
    page = tables.DOCS.read_text(encoding="utf-8")
    assert scaling.PICTURES.search(page) and page == scaling.with_pictures(page, found)
    for name, points in found.items():
        assert scaling.NUMBERS.with_name(f"{name}.svg").is_file()
        assert {len(values) for values in points["lines"].values()} == {len(points["x"])}
