"""kitae chat over an endpoint: a real server, and fakes for what ours does not do."""

import io
import json

import pytest
from serving import KEY

from kitae.cli.chat import without_thinking
from kitae.cli.main import main


@pytest.fixture
def chat(monkeypatch, capsys):
    """Talk to an endpoint line by line: exit code, answers, and what was said beside them."""

    def run(url, *words, lines=("2+2",), key=KEY):
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        token = [] if key is None else ["--token", key]
        code = main(["chat", *map(str, words), "--endpoint", url, *token])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_an_answer_is_the_server_s_and_a_seed_repeats_it(running, chat):
    code, out, err = chat(running.url, "--max_new_tokens", 12, "--seed", 2)
    assert code == 0, err
    expected = running.client().chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "2+2"}],
        max_tokens=12,
        seed=3,
        temperature=0.6,
        top_p=0.95,
    )
    assert out == expected.choices[0].message.content + "\n" and out.startswith("<think>\n")
    assert err.startswith("tiny: /reset")
    assert chat(f"{running.url}/v1/", "tiny", "--max_new_tokens", 12, "--seed", 2)[1] == out


def test_it_remembers_resets_saves_and_folds(running, chat, tmp_path):
    file = tmp_path / "rows.jsonl"
    words = ("--max_new_tokens", 5, "--system", "Be brief.", "--seed", 0)
    code, out, err = chat(
        running.url, *words, lines=["1", "2", f"/save {file}", "/reset", "1", f"/save {file}", "/think"]
    )
    assert code == 0, err
    first, second = [json.loads(line)["messages"] for line in file.read_text().splitlines()]
    assert first.pop(0) == second.pop(0) == {"role": "system", "content": "Be brief."}
    assert first[:2] == second and [turn["role"] for turn in first] == ["user", "assistant"] * 2
    assert out == "".join(turn["content"] + "\n" for turn in [first[1], first[3], second[1]])
    assert err.rstrip().endswith(second[1]["content"].removeprefix("<think>").strip())
    _, folded, _ = chat(running.url, *words, "--fold", lines=["1", "/fold", "2"])
    assert folded == f"[thinking, {len(first[1]['content'])} characters]\n{first[3]['content']}\n"


def sse(*chunks):
    """A reply that streams these chunks."""

    def write(out):
        for chunk in chunks:
            out.write(
                b"data: " + (chunk if isinstance(chunk, bytes) else json.dumps(chunk).encode()) + b"\n\n"
            )

    return write


def delta(**fields):
    return {"choices": [{"index": 0, "delta": fields}]}


def test_thinking_that_comes_apart_is_shown_and_not_sent_back(endpoint, chat):
    chunks = [delta(role="assistant", content=""), delta(reasoning_content="hm"), delta(reasoning_content="m"),
              delta(content="four"), delta(content="!"), {"choices": []}, b"[DONE]"]  # fmt: skip
    endpoint.reply = lambda number, body: sse(*chunks)
    code, out, _ = chat(
        endpoint.url, "m", "--no-think", "--system", "S", "--top_k", 5, lines=["2+2", "sure?"]
    )
    assert code == 0 and out == "<think>\nhmm\n</think>\n\nfour!\n" * 2
    sent = endpoint.bodies[1]
    assert sent["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "four!"},
        {"role": "user", "content": "sure?"},
    ]
    assert sent["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False}
    assert sent["top_k"] == 5
    assert sent.keys() == {"model", "messages", "stream", "top_k", "chat_template_kwargs"}, (
        "the rest is the server's"
    )
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_settings_that_are_given_are_sent_under_the_api_s_names(endpoint, chat):
    endpoint.reply = lambda number, body: sse(delta(content="4"), b"[DONE]")
    words = ("--temperature", 0.6, "--top_p", 0.95, "--max_new_tokens", 9, "--stop", "x", "--seed", 5)
    assert chat(endpoint.url, "m", *words)[0] == 0
    sent = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 9, "stop": ["x"], "seed": 6}
    assert sent.items() <= endpoint.bodies[0].items()


@pytest.mark.parametrize(
    ("content", "left"),
    [
        ("<think>\na</think>\n\nb", "b"),
        ("a</think>b", "b"),
        ("b", "b"),
        ("<think>cut off", ""),
        ("a <think>", "a <think>"),
    ],
)
def test_history_is_sent_without_thinking(content, left):
    assert without_thinking({"role": "assistant", "content": content}) == left
    assert without_thinking({"role": "user", "content": content}) == content


def test_what_goes_wrong_is_said_and_the_turn_is_not_kept(endpoint, running, chat):
    answers = [
        sse({"error": {"message": "out of memory"}}),
        sse(delta(content="half")),
        (429, {}, {"error": {"message": "full"}}),
        sse(b"nonsense"),
        sse(delta(content="fine"), b"[DONE]"),
    ]
    endpoint.reply = lambda number, body: answers[number]
    code, out, err = chat(endpoint.url, "m", lines=["a", "b", "c", "d", "e"])
    assert code == 0 and out.endswith("fine\n")
    for said in (
        "failed: out of memory",
        "broke the answer off",
        "answers 429: full",
        "not JSON: b'nonsense'",
    ):
        assert said in err
    assert endpoint.bodies[-1]["messages"] == [{"role": "user", "content": "e"}]
    assert "max_tokens" not in endpoint.bodies[-1], "the server knows how much of the context is left"
    for url, key, said in [
        (running.url, "wrong", "answers 401"),
        (running.url, None, "give its token with --token"),
        ("http://127.0.0.1:1", KEY, "cannot be reached"),
        ("localhost", KEY, "write its address"),
        ("http://localhost:port", KEY, "write its address"),
    ]:
        code, _, err = chat(url, key=key)
        assert code == 2 and said in err and err.count("\n") == 1, err


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_not_utf_8_is_refused_and_the_chat_goes_on(endpoint, monkeypatch, capsys, errors):
    endpoint.reply = lambda number, body: sse(delta(content="fine"), b"[DONE]")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xffb\nb\n"), "utf-8", errors))
    assert main(["chat", "m", "--endpoint", endpoint.url]) == 0
    out, err = capsys.readouterr()
    assert out == "fine\n" and "this turn is not UTF-8 at character 2" in err
    assert [body["messages"][-1]["content"] for body in endpoint.bodies] == ["b"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("chat",), "there is no model"),
        (("chat", "m", "--token", "x"), "--token has no effect without --endpoint"),
        (("chat", "--endpoint", "http://x", "--dtype", "float32"), "--dtype has no effect with --endpoint"),
        (("chat", "m", "--system", "a", "--system_prompt", "b"), "both set"),
        (("chat", "--endpoint", "http://x", "--token_file", "absent"), "cannot read absent"),
    ],
)
def test_settings_without_effect_are_refused(words, said, capsys):
    assert main(list(words)) == 2
    assert said in capsys.readouterr().err
