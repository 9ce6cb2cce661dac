"""kitae launch: its own flags, and everything else to the ranks."""

import pytest

from kitae.cli import launch


@pytest.fixture
def started(monkeypatch):
    calls = []

    def record(argv, *, nproc_per_node):
        calls.append((argv, nproc_per_node))
        return 7

    monkeypatch.setattr(launch, "launch", record)
    return calls


@pytest.mark.parametrize(
    "flags", [["--nproc_per_node", "8"], ["--nproc_per_node=8"], ["--nproc-per-node", "8"]]
)
def test_flags_before_the_command_are_launchs_own(kitae, started, flags):
    assert kitae("launch", *flags, "train", "sft", "--lr", "1")[0] == 7
    assert started == [(["train", "sft", "--lr", "1"], 8)]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--hostfile", "h", "--nproc_per_node", "8", "train"],
            "--hostfile: starting ranks on several machines is not there yet",
        ),
        (["--nproc_per_node", "many", "train"], "--nproc_per_node is 'many'"),
        (["--nproc_per_node", "0", "train"], "--nproc_per_node is '0'"),
        (["train", "sft"], "--nproc_per_node is missing"),
        (["--nproc_per_node", "2"], "the command to run is missing"),
        (["--gpus", "2", "train"], "kitae launch has no flag --gpus"),
    ],
)
def test_what_launch_cannot_do_is_one_line(kitae, started, words, message):
    code, _, err = kitae("launch", *words)
    assert (code, started) == (2, [])
    assert err.startswith(f"kitae: error: {message}") and err.count("\n") == 1
