"""kitae deploy and kitae endpoints: a real server in the background, seen from the folder and over HTTP."""

import json
import os
import signal
import socket
import stat
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

pytest.importorskip("uvicorn", reason="kitae[serve] is not installed")

from kitae.cli.main import main
from kitae.errors import KitaeError, LockedError
from kitae.jobs import endpoints
from kitae.jobs.job import Job


@pytest.fixture(autouse=True)
def stop_what_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("KITAE_HOME", str(tmp_path / "home"))
    yield
    for endpoint in endpoints.everything():
        endpoint.job.stop(grace_s=1)


def said(capsys, *words: str) -> tuple[int, str, str]:
    code = main(list(words))
    out, err = capsys.readouterr()
    return code, out, err


def test_deploy_gives_url_and_token_and_stop_ends_it(tiny, capsys):
    model = str(tiny("qwen3"))
    code, out, _ = said(capsys, "deploy", model, "--name", "mine", "--temperature", "0", "--grace_s", "30")
    assert code == 0, out
    info = json.loads(said(capsys, "endpoints", "info", "mine", "--json")[1])
    assert info["state"] == "running" and "note" not in info and info["model"] == model
    assert f"{info['url']}/v1" in out and info["token"] in out
    [chat] = [line for line in out.splitlines() if "kitae chat" in line]
    assert "--token_file" in chat and info["token"] not in chat, "others can read a command line"

    asked = {"model": info["models"][0], "messages": [{"role": "user", "content": "1+1="}], "max_tokens": 4}
    assert post(info["url"], info["token"], asked)["usage"]["completion_tokens"] <= 4
    with pytest.raises(urllib.error.HTTPError, match="401"):
        post(info["url"], "wrong", asked)

    assert endpoints.find("mine").job.facts()["grace_s"] > 30
    folder = endpoints.find("mine").job.folder
    assert stat.S_IMODE((folder / "token").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert info["token"] not in (folder / "output.log").read_text() + (folder / "job.json").read_text()

    assert "mine" in said(capsys, "endpoints")[1]
    assert "is running" in said(capsys, "deploy", model, "--name", "mine")[2], "a name in use"
    assert said(capsys, "endpoints", "remove", "mine")[0] == 75
    assert said(capsys, "endpoints", "stop", "mine") == (0, "", "mine stopped\n")
    table = said(capsys, "endpoints", "list")[1]
    assert "stopped" in table and info["url"] not in table
    assert said(capsys, "endpoints", "stop", "mine")[0] == 0, "stopping twice does no harm"
    assert said(capsys, "endpoints", "remove", "mine")[0] == 0
    assert "there is no endpoint" in said(capsys, "endpoints")[1]


def test_a_model_that_is_not_there_fails_with_its_reason(capsys):
    code, _, err = said(capsys, "deploy", "/no/such/model", "--name", "bad")
    assert code != 0 and "failed while it was loading" in err and "/no/such/model" in err
    assert "failed" in said(capsys, "endpoints")[1]
    assert "/no/such/model" in said(capsys, "endpoints", "log", "bad")[1]


def test_a_port_in_use_is_said_in_one_line_and_by_the_exit_code(tiny, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        code, _, err = said(capsys, "deploy", str(tiny("qwen3")), "--name", "second", "--port", port)
    last = err.splitlines()[-1]
    assert code == 69 and last.startswith(
        "kitae: error: endpoint second failed while it was loading: cannot listen on"
    )
    [_, row, note] = said(capsys, "endpoints")[1].splitlines()
    assert row.split()[:2] == ["second", "failed"] and len(row) < 200
    assert note.startswith("second: cannot listen on")


def test_ctrl_c_while_it_loads_leaves_it_alive(tiny, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(endpoints, "wait", interrupted)
    code, _, err = said(capsys, "deploy", str(tiny("qwen3")), "--name", "slow")
    assert code == 130 and "kitae endpoints stop slow" in err
    assert endpoints.find("slow").state() in ("creating", "loading", "running")


def test_a_server_that_hangs_is_a_note_and_one_that_was_killed_has_failed(tiny, capsys):
    said(capsys, "deploy", str(tiny("qwen3")), "--name", "hung")
    endpoint = endpoints.find("hung")
    pid = endpoint.job.process()["pid"]
    os.kill(pid, signal.SIGSTOP)
    assert "does not answer" in said(capsys, "endpoints")[1]
    os.kill(pid, signal.SIGCONT)
    os.kill(pid, signal.SIGKILL)
    while endpoint.job.is_alive():
        time.sleep(0.02)
    assert endpoint.state() == "failed" and endpoint.job.end()["code"] == -9
    assert "hung: ended by signal 9 (SIGKILL, " in said(capsys, "endpoints")[1]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["deploy", "m", "--name", "No Good"], "use small letters"),
        (["deploy", "m", "--name"], "--name needs a value"),
        (["deploy", "m", "--api_key", "x"], "a token and files of its own"),
        (["deploy", "m", "--no_such_flag", "1"], "no_such_flag"),
        (["endpoints", "lits"], "did you mean 'list'"),
        (["endpoints", "info"], "needs the name"),
        (["endpoints", "info", "nothing"], "there is no endpoint 'nothing'"),
        (["endpoints", "stop", "x", "--json"], "has no flag --json"),
        (["endpoints", "list", "x"], "did you mean kitae endpoints info x"),
    ],
)
def test_bad_words_start_nothing(capsys, words, error):
    code, out, err = said(capsys, *words)
    assert code == 2 and error in err and not out
    assert not endpoints.everything()


def test_names_are_made_from_models_and_never_collide(monkeypatch):
    assert (
        endpoints._free_name("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B/") == "deepseek-r1-distill-qwen-1.5b"
    )
    assert endpoints._free_name("日本語") == "model"
    with endpoints._names() as base:
        folder = endpoints._claim(base / "model")
    (folder / "job.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(endpoints.Endpoint, "state", lambda self: "running")
        assert endpoints._free_name("日本語") == "model-2"
    assert endpoints._free_name("日本語") == "model", "one that has ended gives its name back"


@pytest.fixture
def sleeper(monkeypatch):
    """Jobs that sleep instead of serving."""
    start = Job.start

    def begin(folder, command, **how):
        return start(folder, [sys.executable, "-c", "import time; time.sleep(60)"], **how)

    monkeypatch.setattr(Job, "start", begin)


def deploy_at_once(count: int, **how) -> list[endpoints.Endpoint | KitaeError]:
    barrier = Barrier(count)

    def deploy(_):
        barrier.wait()
        try:
            return endpoints.deploy([], model="m", grace_s=1, **how)
        except KitaeError as error:
            return error

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(deploy, range(count)))


def test_of_several_that_take_an_ended_name_at_once_one_wins_and_the_others_are_told(sleeper):
    for _ in range(3):
        found = deploy_at_once(6, name="same")
        [won] = [one for one in found if isinstance(one, endpoints.Endpoint)]
        assert won.state() in ("creating", "loading") and won.job.is_alive() and won.token
        lost = [one for one in found if isinstance(one, LockedError)]
        assert len(lost) == 5 and all("stop it first: kitae endpoints stop same" in str(e) for e in lost)
        assert won.job.stop(grace_s=1) == "stopped"


def test_several_without_a_name_at_once_get_one_each(sleeper):
    names = sorted(one.name for one in deploy_at_once(4))
    assert names == ["m", "m-2", "m-3", "m-4"]


def test_what_a_killed_deploy_left_is_taken_over_and_other_folders_are_not(sleeper, tmp_path):
    base = tmp_path / "home" / "endpoints"
    (base / "half").mkdir(parents=True)
    (base / "half" / "token").write_text("old")
    (base / "notes").mkdir()
    (base / "notes" / "mine.txt").write_text("keep me")
    assert endpoints.deploy([], model="m", grace_s=1, name="half").token != "old"
    with pytest.raises(LockedError, match="is not an endpoint's; choose another --name"):
        endpoints.deploy([], model="m", grace_s=1, name="notes")
    assert (base / "notes" / "mine.txt").read_text() == "keep me"


def post(url: str, token: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)
