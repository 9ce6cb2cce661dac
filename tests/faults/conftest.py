"""One fork server for all fault tests, and what an undisturbed run looks like."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # the helpers beside this file

from fault_outcome import numbers, weights
from fault_server import Server


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("lives"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(server: Server, tmp_path_factory: pytest.TempPathFactory):
    """A function options -> (numbers, weights) of a run that nothing happened to."""
    known: dict[str, tuple[list, str]] = {}

    def outcome(**options) -> tuple[list, str]:
        key = repr(sorted(options.items()))
        if key not in known:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            life = server.run(folder, **options)
            assert life.code == 0, life.text()
            known[key] = (numbers(folder), weights(folder))
        return known[key]

    return outcome


@pytest.fixture(autouse=True)
def _kitae_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of this process leave their pointers here, not in the tester's home."""
    monkeypatch.setenv("KITAE_HOME", str(tmp_path.parent / "kitae_home"))
