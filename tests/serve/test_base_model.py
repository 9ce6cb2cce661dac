"""A base model without chat template: it goes on from text, and says what a chat needs."""

import json

import pytest
from serving import Running

from kitae.cli.main import main


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    from kitae.models.toy import make_model, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return make_model(tmp_path_factory.mktemp("base"), "qwen3", tokenizer=tokenizer)


@pytest.fixture(scope="module")
def untemplated(base):
    server = Running(base)
    yield server
    server.close()


def test_it_completes_as_the_same_model_with_a_template_does(untemplated, tiny):
    ask = {"model": "tiny", "prompt": "2+2=", "max_tokens": 20, "seed": 1, "logprobs": 2, "echo": True}
    said = untemplated.client(strict=False).completions.create(**ask).choices[0]
    templated = Running(tiny("qwen3"))
    try:
        assert said == templated.client(strict=False).completions.create(**ask).choices[0]
    finally:
        templated.close()
    held = untemplated.client().completions.create(
        model="tiny",
        prompt="a",
        max_tokens=60,
        extra_body={"response_format": {"type": "json_object"}},
        seed=3,
    )
    assert held.choices[0].finish_reason == "length" or isinstance(json.loads(held.choices[0].text), dict)


def test_a_chat_is_refused_and_says_how_to_give_a_template(untemplated):
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
    status, error = untemplated.refused("/v1/chat/completions", body)
    assert (status, error["param"]) == (400, "messages")
    assert "no chat template" in error["message"] and "--template" in error["message"]


def test_raw_prompts_need_no_template_and_chats_do(base, capsys):
    words = ["generate", str(base), "--prompt", "2+2=", "--max_new_tokens", "3", "--engine", "generic"]
    assert main([*words, "--raw"]) == 0
    assert capsys.readouterr().out
    assert main(words) == 2
    assert "has no chat template; set data.template" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--raw"], ["--seed", "3"]])
def test_a_setting_without_effect_in_a_server_is_refused(base, words, capsys):
    assert main(["serve", str(base), "--port", "0", *words]) == 2
    assert f"{words[0]} has no effect in a server" in capsys.readouterr().err


def test_a_system_prompt_that_nothing_writes_is_refused(base, capsys):
    words = ["serve", str(base), "--port", "0", "--system_prompt", "Be brief."]
    for engine in ("auto", "vllm"):
        assert main([*words, "--engine", engine]) == 2
        assert "system_prompt has no effect" in capsys.readouterr().err
