"""kitae pipeline: five stages on a tiny model, killed and continued; done is done, changed is refused."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from kitae.cli._stages import read_pipeline, settings_file
from kitae.errors import ConfigError

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
R1 = """
output_dir = "r1"

[defaults]
model.dtype = "float32"
log.report_to = ["none"]
train.num_threads = 1
data.max_length = 64

[[stage]]
name = "cold"
run = "sft"
model.name_or_path = "base"
data.train = ["sft.jsonl"]
train.max_steps = 140
train.per_device_train_batch_size = 12
optim.learning_rate = 1e-2
save.steps = 40

[[stage]]
name = "rl"
run = "grpo"
[stage.model]
name_or_path = "@cold"
[stage.data]
train = ["rl.jsonl"]
system_prompt = ""
[stage.rollout]
prompts_per_round = 4
num_generations = 4
max_new_tokens = 40
[stage.train]
max_steps = 3
[stage.save]
steps = 1

[[stage]]
name = "reject"
run = "sample"
model = "@rl"
dataset_name = ["rl.jsonl"]
max_new_tokens = 40
n = 3
keep = 2

[[stage]]
name = "final"
run = "sft"
model.name_or_path = "base"
data.train = ["sft.jsonl", "@reject"]
train.max_steps = 5

[[stage]]
name = "report"
run = "evaluate"
model = "@final"
baseline = "@cold"
dataset_name = "rl.jsonl"
max_new_tokens = 40
"""
STAGES = ["01-cold", "02-rl", "03-reject", "04-final", "05-report"]


def write_files(folder, tiny):
    def rows(name, make):
        (folder / name).write_text("".join(json.dumps(make(i)) + "\n" for i in range(12)))

    rows(
        "sft.jsonl",
        lambda i: {"prompt": f"{i}+{i}", "completion": f"<think>x</think><answer>{2 * i}</answer>"},
    )
    rows("rl.jsonl", lambda i: {"prompt": f"{i}+{i}", "answer": f"{2 * i}"})
    (folder / "r1.toml").write_text(R1)
    (folder / "base").symlink_to(tiny())


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A folder where the pipeline ran to its end, killed twice on the way; and what the last life said."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_files(folder, tiny)
    rng = random.Random(os.environ.get("KITAE_TEST_SEED", "7"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KITAE_HOME": str(folder / "home")}
    for life in range(3):
        process = subprocess.Popen(
            [sys.executable, "-m", "kitae", "pipeline", "r1.toml"],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        if life < 2:
            time.sleep(rng.uniform(2, 7))
            process.send_signal(signal.SIGKILL)
        text, _ = process.communicate(timeout=600)
        if process.returncode == 0:
            break
    assert process.returncode == 0, text
    return folder, text


@pytest.fixture
def here(finished, monkeypatch):
    monkeypatch.chdir(finished[0])
    return finished[0]


def test_killed_at_random_it_ends_with_five_ordinary_outputs(here, finished, kitae):
    from transformers import AutoModelForCausalLM

    known = json.loads((here / "r1" / "pipeline.json").read_text())["stages"]
    assert list(known) == STAGES and {record["state"] for record in known.values()} == {"done"}
    for label in ("01-cold", "02-rl", "04-final"):
        assert json.loads((here / "r1" / label / "exit.json").read_text())["code"] == 0
        AutoModelForCausalLM.from_pretrained(here / "r1" / label)
    rows = [json.loads(line) for line in (here / "r1/03-reject/rows.jsonl").read_text().splitlines()]
    asked = (here / "r1/03-reject/rows.jsonl.asked.jsonl").read_text().splitlines()
    assert rows and len(asked) == 36
    assert all(row["messages"][-1]["content"].endswith(f"<answer>{row['answer']}</answer>") for row in rows)
    summary = json.loads((here / "r1/05-report/summary.json").read_text())
    assert summary["baseline"]["problems"] == 12 and summary["model"] == "r1/04-final"
    steps = [
        json.loads(line)["step"] for line in (here / "r1/01-cold/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 141))
    text = finished[1]
    assert "baseline" in text and "rows of 36 answers" in text
    code, _, err = kitae("train", "sft", "r1/settings/04-final.toml")
    assert code == 2 and "already holds a run" in err, "a stage's settings file is that of an ordinary run"


def test_run_again_it_does_nothing(here, kitae, monkeypatch):
    monkeypatch.setattr("kitae.parallel.launch.launch", lambda *_, **__: pytest.fail("a stage was started"))
    before = {
        path: path.stat().st_mtime_ns for path in (here / "r1").rglob("*") if path.name != "pipeline.lock"
    }
    code, out, err = kitae("pipeline", "r1.toml")
    assert code == 0, err
    assert out.count("done before") == 5
    after = {
        path: path.stat().st_mtime_ns for path in (here / "r1").rglob("*") if path.name != "pipeline.lock"
    }
    assert after == before
    code, out, _ = kitae("pipeline", "r1.toml", "--dry_run")
    assert code == 0 and out.count("done") == 5 and "@final, @cold" in out


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_steps = 3", "max_steps = 4", "rl has finished {}train.max_steps 3 -> 4)"),
        ("keep = 2\n", "keep = 2\nseed = 1\n", "reject has finished {}seed 0 -> 1)"),
        ('run = "evaluate"', 'run = "evaluate"\ntop_p = 0.5', "report has finished {}top_p 1.0 -> 0.5)"),
    ],
)
def test_a_finished_stage_whose_settings_changed_is_refused(here, kitae, old, new, message):
    message = f"stage {message.format('with other settings or inputs (then -> now: ')}"
    (here / "changed.toml").write_text(R1.replace(old, new))
    code, _, err = kitae("pipeline", "changed.toml")
    assert code == 2 and err.startswith(f"kitae: error: {message}; undo these changes, or add --from")
    assert err.count("\n") == 1
    code, out, err = kitae("pipeline", "changed.toml", "--dry_run")
    assert code == 2 and "changed" in out and message in err


def test_a_finished_stage_whose_data_changed_is_refused(here, kitae):
    text = (here / "rl.jsonl").read_text()
    try:
        (here / "rl.jsonl").write_text(text.replace("3+3", "3 + 3"))
        code, _, err = kitae("pipeline", "r1.toml", "--dry_run")
        assert code == 2 and "stage rl has finished with other" in err and "inputs.rl.jsonl" in err
    finally:
        (here / "rl.jsonl").write_text(text)


def test_settings_that_another_version_had_are_no_changes(here, kitae):
    """A newer kitae has more settings, at their defaults; nobody has to do a finished pipeline again for that."""
    path = here / "r1" / "pipeline.json"
    text = path.read_text()
    known = json.loads(text)
    try:
        settings = known["stages"]["02-rl"]["settings"]
        del settings["rollout"]["top_k"]
        settings["rollout"]["gone"] = 3
        path.write_text(json.dumps(known))
        assert kitae("pipeline", "r1.toml", "--dry_run")[0] == 0
        del settings["rollout"]["max_new_tokens"], settings["data"]["columns"]
        settings["data"]["columns"] = {"prompt": "frage"}
        path.write_text(json.dumps(known))
        _, _, err = kitae("pipeline", "r1.toml", "--dry_run")
        assert "data.columns.prompt frage -> (absent); rollout.max_new_tokens (absent) -> 40" in err
    finally:
        path.write_text(text)


def test_changes_without_consequences_are_no_changes(here, kitae):
    (here / "changed.toml").write_text(R1.replace("save.steps = 40", "save.steps = 70\nlog.steps = 3"))
    assert kitae("pipeline", "changed.toml", "--dry_run")[0] == 0
    (here / "moved").symlink_to(here / "r1")
    assert kitae("pipeline", "r1.toml", "--dry_run", "--output_dir", "moved")[0] == 0


def test_another_filter_asks_nothing_and_names_the_stages_made_from_it(here, kitae):
    (here / "changed.toml").write_text(R1.replace("keep = 2", "keep = 1"))
    code, out, err = kitae("pipeline", "changed.toml", "--dry_run")
    assert code == 2 and "to go on" in out
    assert "stage final was made from an earlier reject, which is to be done; add --from final" in err


def test_from_a_stage_moves_it_and_what_follows_aside(here, kitae, monkeypatch):
    import shutil

    shutil.copytree(here / "r1", here / "copy", symlinks=True)
    started = []
    monkeypatch.setattr("kitae.parallel.launch.launch", lambda argv, **_: started.append(argv) or 2)
    code, _, err = kitae("pipeline", "r1.toml", "--output_dir", "copy", "--from", "final")
    assert code == 2 and "stage final failed with exit code 2, its error is above" in err
    assert started == [["train", "sft", "copy/settings/04-final.toml"]]
    [aside] = (here / "copy" / "earlier").iterdir()
    assert sorted(path.name for path in aside.iterdir()) == STAGES[3:]
    assert (aside / "04-final" / "model.safetensors").is_file() and (here / "copy" / "02-rl").is_dir()
    assert list(json.loads((here / "copy" / "pipeline.json").read_text())["stages"]) == STAGES[:4]
    assert kitae("pipeline", "r1.toml", "--from", "finale")[2].endswith("did you mean 'final'?\n")


def test_a_folder_nobody_knows_of_is_not_written_to(here, kitae):
    (here / "other" / "01-cold").mkdir(parents=True)
    (here / "other" / "01-cold" / "mine.txt").write_text("mine")
    code, _, err = kitae("pipeline", "r1.toml", "--output_dir", "other")
    assert code == 2 and "other/01-cold is there, but" in err and "--from cold" in err


def test_a_signal_reaches_the_stage_which_saves(tmp_path, tiny):
    write_files(tmp_path, tiny)
    (tmp_path / "r1.toml").write_text(R1.replace("max_steps = 140", "max_steps = 100000"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KITAE_HOME": str(tmp_path / "home")}
    process = subprocess.Popen(
        [sys.executable, "-m", "kitae", "pipeline", "r1.toml"],
        cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "r1/01-cold/metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "stopped in stage cold; the same command again goes on from there" in err
    assert "stopped" in out and "not run" in out
    status = json.loads((tmp_path / "r1/01-cold/status.json").read_text())
    assert status["state"] == "stopped" and status["checkpoint"] == status["step"] > 0


def test_a_stage_that_fails_stops_the_pipeline_with_its_own_error(tmp_path, tiny, monkeypatch, capfd):
    write_files(tmp_path, tiny)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sft.jsonl").write_text('{"prompt": "1"}\n')
    code = subprocess.run([sys.executable, "-m", "kitae", "pipeline", "r1.toml"]).returncode
    _, err = capfd.readouterr()
    assert code == 2
    first, *_, last = [line for line in err.splitlines() if line.startswith("kitae: error")]
    assert "nothing to teach" in first
    assert last.startswith("kitae: error: stage cold failed with exit code 2, its error is above")


# reading ----------------------------------------------------------------------------------------------------


def stage_of(text, name, tmp_path):
    path = tmp_path / "p.toml"
    path.write_text(text)
    return next(stage for stage in read_pipeline(path)[1] if stage.name == name)


def test_references_become_paths_and_the_settings_file_says_the_same(tmp_path):
    stage = stage_of(R1, "final", tmp_path)
    assert stage.settings["data"]["train"] == ["sft.jsonl", "r1/03-reject/rows.jsonl"]
    assert stage.uses == ["reject"]
    written = tomllib.loads(settings_file(stage))
    assert written["data"]["train"] == ["sft.jsonl", "r1/03-reject/rows.jsonl"]
    assert written["output_dir"] == "r1/04-final" and written["model"]["dtype"] == "float32"
    text = R1.replace('model = "@rl"', 'model = "@rl/checkpoints/step_000002"')
    assert stage_of(text, "reject", tmp_path).settings["model"] == "r1/02-rl/checkpoints/step_000002"


@pytest.mark.parametrize("name", ["cold", "rl", "reject", "final", "report"])
def test_a_stages_settings_file_resolves_to_its_settings(tmp_path, name):
    from kitae.cli._stages import COMMANDS
    from kitae.config import as_json
    from kitae.settings import read, resolve

    text = R1.replace(
        'name = "cold"\n',
        'name = "cold"\ndata.columns = { prompt = "fr\u00e4ge \\"q\\"" }\ndata.max_rows = 3\n',
    )
    stage = stage_of(text, name, tmp_path)
    path = tmp_path / "stage.toml"
    path.write_text(settings_file(stage))
    if stage.run in COMMANDS:
        found, _ = read(stage.run, COMMANDS[stage.run], [str(path)])
    else:
        found, _ = resolve(stage.run, [str(path)])
    assert as_json(found) == stage.settings


def test_defaults_reach_the_stages_that_have_them_and_profit(tmp_path):
    found = {name: stage_of(R1, name, tmp_path) for name in ("cold", "rl", "reject", "report")}
    assert found["cold"].settings["data"]["max_length"] == 64
    assert "data.max_length" not in found["rl"].given, "GRPO would refuse it as without effect"
    assert found["reject"].settings["dtype"] == found["report"].settings["dtype"] == "float32"
    text = R1.replace("save.steps = 40", 'save.steps = 40\nmodel.dtype = "bfloat16"')
    assert stage_of(text, "cold", tmp_path).settings["model"]["dtype"] == "bfloat16"
    text = R1.replace("save.steps = 40", 'save.steps = 40\ntorch_dtype = "bfloat16"')
    assert stage_of(text, "cold", tmp_path).settings["model"]["dtype"] == "bfloat16", (
        "another program's word counts too"
    )
    text = R1.replace("train.max_steps = 5", "train.max_steps = 5\nnproc_per_node = 2")
    assert stage_of(text, "final", tmp_path).nproc_per_node == 2


def line_of(text, words):
    return next(number for number, line in enumerate(text.splitlines(), 1) if words in line)


@pytest.mark.parametrize(
    ("old", "new", "message", "line"),
    [
        ("train.max_steps = 5", "train.max_stps = 5", "stage 'final': unknown setting train.max_stps", "max_stps"),
        ("max_steps = 3", "max_steps = 0", "stage 'rl': train.max_steps is 0", "max_steps = 0"),
        ('"@cold"\n[stage.data]', '"@cald"\n[stage.data]', "refers to no stage; did you mean 'cold'?", "@cald"),
        ('"base"\ndata.train = ["sft.jsonl"]', '"@final"\ndata.train = ["sft.jsonl"]', "has not run before it", "@final"),
        ('model = "@rl"', 'model = "@reject"', "has not run before it", "@reject"),
        ('"@reject"]', '"@rl"]', "cannot be used there: a stage that runs grpo gives a model", '"@rl"]'),
        ('model = "@final"', 'model = "@reject"', "a stage that runs sample gives rows", 'model = "@reject"'),
        ('run = "grpo"', 'run = "grop"', "did you mean 'grpo'?", "grop"),
        ('name = "final"', 'name = "rl"', "two stages are called 'rl'", None),
        ('name = "final"', 'name = "a/b"', "needs a name of letters, digits", "a/b"),
        ('name = "final"', 'name = "final"\nresume = true', "sets resume", "resume"),
        ('name = "final"', 'name = "final"\nnproc_per_node = 0', "nproc_per_node = 0", "nproc_per_node"),
        ('name = "reject"', 'name = "reject"\nnproc_per_node = 2', "for recipes only", "nproc_per_node"),
        ("data.max_length = 64", "data.max_lenght = 64", "no stage has the default data.max_lenght", "max_lenght"),
        ("train.num_threads = 1", "train.num_threads = -1", "train.num_threads is -1", "num_threads = -1"),
        ('output_dir = "r1"', 'output_dri = "r1"', "unknown name output_dri", "output_dri"),
        ("keep = 2", "keep = 4", "stage 'reject': keep is 4, but each problem has only n = 3", None),
        ("save.steps = 40", "lora.alpha = 3.0", "stage 'cold': lora.alpha", "lora.alpha"),
    ],
)  # fmt: skip
def test_mistakes_are_said_with_their_line_before_anything_runs(
    tmp_path, monkeypatch, kitae, old, new, message, line
):
    text = R1.replace(old, new, 1)
    assert text != R1
    path = tmp_path / "p.toml"
    path.write_text(text)
    monkeypatch.chdir(tmp_path)
    code, _, err = kitae("pipeline", "p.toml")
    assert code == 2 and message in err and err.count("\n") == 1
    assert line is None or f"p.toml line {line_of(text, line)}" in err
    assert [entry.name for entry in tmp_path.iterdir()] == ["p.toml"]


def test_files_that_are_no_pipelines(tmp_path):
    path = tmp_path / "p.toml"
    for text, message in (
        ("", "has no stages"),
        ("stage = 3", "has no stages"),
        ("[[stage]\n", "is not valid TOML"),
        ('defaults = 3\n[[stage]]\nname = "a"\nrun = "sft"', "is no table"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_pipeline(path)
    with pytest.raises(ConfigError, match=r"cannot read the pipeline file .*absent\.toml"):
        read_pipeline(tmp_path / "absent.toml")


def test_a_pipeline_is_read_without_torch(tmp_path):
    (tmp_path / "p.toml").write_text(R1)
    code = (
        "import sys; from kitae.cli.main import main; code = main(['pipeline', 'p.toml', '--dry_run']);"
        "sys.exit('torch' in sys.modules or code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "r1").exists() and done.stdout.count("to do") == 5


def test_the_example_runs_on_a_tiny_model(tmp_path, tiny, kitae, monkeypatch):
    """In one process, and with fewer steps; what it asks for is otherwise as it stands."""
    from kitae.cli.main import main

    monkeypatch.chdir(tmp_path)
    write_files(tmp_path, tiny)
    data = tmp_path / "runs" / "quickstart"
    data.mkdir(parents=True)
    (data / "model").symlink_to(tiny())
    for name, source in (("sft", "sft"), ("grpo", "rl"), ("held_out", "rl")):
        (data / f"{name}.jsonl").write_text((tmp_path / f"{source}.jsonl").read_text())
    text = (EXAMPLES / "r1-pipeline.toml").read_text()
    for old, new in {
        "max_steps = 400": "max_steps = 140", "batch_size = 48": "batch_size = 12", "2e-3": "1e-2",
        "max_steps = 40 ": "max_steps = 2 ", "prompts_per_round = 16": "prompts_per_round = 2",
        "num_generations = 16": "num_generations = 2", "seed = 0": "seed = 0\ntrain.num_threads = 1",
    }.items():  # fmt: skip
        assert old in text
        text = text.replace(old, new)
    (tmp_path / "r1.toml").write_text(text)
    monkeypatch.setattr("kitae.parallel.launch.launch", lambda argv, **_: main(argv))
    code, out, err = kitae("pipeline", "r1.toml")
    assert code == 0, err
    summary = json.loads((tmp_path / "runs/r1/05-report/summary.json").read_text())
    assert summary["accuracy"] > 0.5 and summary["baseline"]["accuracy"] > 0.5
    assert out.count("done") >= 5


def test_the_example_is_a_pipeline():
    folder, stages = read_pipeline(EXAMPLES / "r1-pipeline.toml")
    assert str(folder) == "runs/r1"
    assert [stage.run for stage in stages] == ["sft", "grpo", "sample", "sft", "evaluate"]
    assert all(
        stage.settings.get("seed", stage.settings.get("train", {}).get("seed")) == 0 for stage in stages
    )
