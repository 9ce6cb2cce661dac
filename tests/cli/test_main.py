"""The frame of every command: help without torch, one-line errors, exit codes."""

import errno
import os
import subprocess
import sys

import pytest

import kitae as package
from kitae.cli import main as frame
from kitae.errors import ConfigError, LockedError, NonFiniteError
from kitae.plugins import names_in

RUN = "import sys; from kitae.cli.main import main; code = main(sys.argv[1:]); "
NO_TORCH = (
    RUN
    + "heavy = {'torch', 'transformers', 'pyarrow'} & set(sys.modules); sys.exit(f'{heavy}' if heavy else code)"
)


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train"],
        ["train", "sft", "--help"],
        ["train", "grpo", "--help"],
        ["evaluate", "--help"],
        ["generate", "--help"],
        ["chat", "--help"],
        ["compare", "--help"],
        ["trace", "--help"],
        ["sample", "--help"],
        ["completion", "bash"],
        ["--version"],
    ],
)
def test_help_needs_no_torch(words):
    done = subprocess.run([sys.executable, "-c", NO_TORCH, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout and not done.stderr


def test_characters_that_the_terminal_lacks_are_no_error():
    says = "import sys; from kitae.cli import main as m; m._dispatch = lambda w: print('\\u65e5 ok') or 0; "
    says += "sys.exit(m.main([]))"
    done = subprocess.run(
        [sys.executable, "-c", says], capture_output=True, text=True,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "? ok\n", "")


SLOW_TO_IMPORT = {
    "pyarrow", "datasets", "peft", "bitsandbytes", "matplotlib", "pandas", "sklearn", "wandb", "torchvision",
    "tensorflow", "uvicorn", "starlette", "gguf",
}  # fmt: skip


def test_the_first_step_of_a_plain_run_imports_only_what_it_needs(tiny, tmp_path):
    """What a user waits for between the command and the first step is imports more than anything else."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1+1", "completion": "2"}\n' * 4)
    ends = f"print(sorted({SLOW_TO_IMPORT} & set(sys.modules))); sys.exit(code)"
    words = ["train", "sft", "--model_name_or_path", str(tiny()), "--data.train", str(rows), "--max_steps", "1",
             "--output_dir", str(tmp_path / "run")]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", RUN + ends, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_collections_go_on_after_the_imports():
    code = (
        "import gc, sys; from kitae.cli._imports import read_all; read_all()\n"
        "assert gc.isenabled() and gc.get_freeze_count() > 100_000 and 'kitae.recipes._run' in sys.modules\n"
        "before = gc.get_freeze_count(); read_all(); assert gc.get_freeze_count() == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_wrong_settings_are_refused_before_torch_is_imported():
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, "train", "sft", "--learnin_rate", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr == "kitae: error: unknown setting --learnin_rate; did you mean '--learning_rate'?\n"


def test_help_is_grouped_with_types_defaults_and_one_line_each(kitae, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    _, out, _ = kitae("train", "grpo", "--help")
    assert "usage: kitae train grpo [run.toml]" in out and "rollout options" in out
    at = out.index("--rollout.num_generations INT")
    assert "Completions per prompt; their mean reward is the baseline. (default: 8)" in out[at : at + 300]


def test_every_command_is_listed_with_a_line_of_its_own(kitae):
    code, out, _ = kitae("--help")
    assert code == 0
    for name, summary in frame.commands().items():
        assert summary and f"  {name}" in out and summary in out
    assert {
        "train",
        "evaluate",
        "compare",
        "generate",
        "chat",
        "trace",
        "launch",
        "reward",
        "sample",
        "pipeline",
        "completion",
        "quickstart",
    } <= set(frame.commands())


def test_version_and_unknown_commands(kitae):
    assert kitae("--version") == (0, f"kitae {package.__version__}\n", "")
    assert kitae("trian") == (2, "", "kitae: error: there is no command 'trian'; did you mean 'train'?\n")
    assert kitae("train", "sftt")[2] == "kitae: error: 'sftt' is no recipe; did you mean 'sft'?\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("two\nlines"), 2),
        (NonFiniteError("nan"), 70),
        (LockedError("locked"), 75),
        (KeyboardInterrupt(), 130),
        (OSError(errno.ENOSPC, "No space left on device", "/full"), 2),
        (OSError(errno.EROFS, "Read-only file system", "/ro"), 2),
    ],
)
def test_exit_codes_and_one_line_errors(kitae, monkeypatch, error, code):
    def fail(_words):
        raise error

    monkeypatch.setattr(frame, "_dispatch", fail)
    found, out, err = kitae("train")
    assert (found, out) == (code, "")
    assert err.count("\n") <= 1 and "Traceback" not in err
    if isinstance(error, OSError):
        assert err == f"kitae: error: {error.strerror}: {error.filename}\n"


def test_an_unexpected_error_is_one_line_and_its_traceback_is_kept(kitae, monkeypatch, tmp_path):
    def fail(_words):
        raise RuntimeError("a bug\nof ours")

    monkeypatch.setattr(frame, "_dispatch", fail)
    monkeypatch.setattr(frame.tempfile, "tempdir", str(tmp_path))
    code, _, err = kitae("train")
    assert code == 1
    assert err.startswith(
        "kitae: error: unexpected RuntimeError: a bug of ours (a bug in kitae; the traceback is in "
    )
    assert err.count("\n") == 1
    [kept] = tmp_path.glob("kitae-error-*.log")
    assert str(kept) in err and "raise RuntimeError" in kept.read_text()


def test_debug_shows_the_traceback(kitae):
    code, _, err = kitae("train", "sft", "--debug", "--learnin_rate", "1")
    assert code == 2
    assert "Traceback" in err and err.endswith("did you mean '--learning_rate'?\n")


def test_a_reader_that_goes_away_is_no_error():
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m kitae completion bash | true; echo ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout in ("0\n", "141\n")


def test_bash_completion_offers_commands_recipes_and_flags():
    script = subprocess.run(
        [sys.executable, "-m", "kitae", "completion", "bash"], capture_output=True, text=True
    ).stdout

    def offered(*words):
        line = " ".join(f"'{word}'" for word in words)
        ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _kitae; echo ${{COMPREPLY[@]}}"
        done = subprocess.run(["bash", "-c", f"{script}\n{ask}"], capture_output=True, text=True)
        return done.stdout.split()

    assert offered("kitae", "tra") == ["trace", "train"]
    assert offered("kitae", "train", "") == names_in("kitae.recipes")
    assert offered("kitae", "train", "sft", "--optim.learn") == ["--optim.learning_rate"]
    assert offered("kitae", "train", "grpo", "x.toml", "--rollout.num") == ["--rollout.num_generations"]
    assert offered("kitae", "evaluate", "--num") == ["--num_samples"]
    assert offered("kitae", "sample", "--base") == ["--base_url"]
    assert offered("kitae", "pipeline", "--dry") == ["--dry_run"]
    assert offered("kitae", "reward", "") == ["test"]
    assert offered("kitae", "reward", "test", "--time") == ["--timeout_s"]
    assert offered("kitae", "launch", "--") == ["--nproc_per_node"]
    for count in (["--nproc_per_node", "2"], ["--nproc_per_node", "=", "2"], ["--nproc", "16"]):
        assert offered("kitae", "launch", *count, "tra") == ["trace", "train"]
        assert offered("kitae", "launch", *count, "train", "") == names_in("kitae.recipes")
        assert offered("kitae", "launch", *count, "train", "sft", "--optim.learn") == [
            "--optim.learning_rate"
        ]
    assert offered("kitae", "trace", "run.toml", "--rec") == ["--recipe"]
    assert "--rollout.num_generations" in offered("kitae", "trace", "run.toml", "--row", "3", "--rollout")


def test_the_other_shells_have_scripts(kitae):
    assert "bashcompinit" in kitae("completion", "zsh")[1]
    assert "complete -c kitae -n '__fish_use_subcommand'" in kitae("completion", "fish")[1]
    assert kitae("completion", "tcsh")[0] == 2
