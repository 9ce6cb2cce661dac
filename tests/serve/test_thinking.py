"""The thinking of an answer: inline with its tags, or apart; on or off where the template has a switch."""

import random

import pytest
from serving import Running

from kitae.serve.thinking import Splitter

ASK = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "2+2"}],
    "max_tokens": 300,
    "seed": 1,
    "temperature": 1,
}


def split(*pieces):
    splitter = Splitter()
    found = [splitter.add(piece, is_last=number == len(pieces) - 1) for number, piece in enumerate(pieces)]
    return "".join(r for r, _ in found), "".join(c for _, c in found)


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\na b\n</think>\n\nc d\n", "a b", "c d\n"),
        ("<think>a <think> b</think>c</think>d", "a <think> b", "c</think>d"),
        ("<think>never closed </thin", "never closed </thin", ""),
        ("no thinking <think>x</think>", "", "no thinking <think>x</think>"),
        ("  <thinx", "", "  <thinx"),
        ("<think></think>x", "", "x"),
        ("<think>\n", "", ""),
        ("", "", ""),
    ],
)
def test_thinking_is_split_off_however_the_text_is_cut(text, reasoning, content):
    assert split(text) == (reasoning, content)
    numbers = random.Random(text)
    for _ in range(200):
        cuts = sorted(numbers.choices(range(len(text) + 1), k=numbers.randrange(6)))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        assert split(*pieces) == (reasoning, content), pieces


def test_a_request_chooses_where_the_thinking_goes(running):
    client = running.client()
    answers = (client.chat.completions.create(**{**ASK, "seed": seed}) for seed in range(50))
    seed, inline = next(
        (i, a.choices[0].message) for i, a in enumerate(answers) if "</think>" in a.choices[0].message.content
    )
    ask = {**ASK, "seed": seed}
    assert inline.content.startswith("<think>\n") and not hasattr(inline, "reasoning_content")
    apart = client.chat.completions.create(**ask, extra_body={"reasoning_format": "split"}).choices[0].message
    assert (apart.reasoning_content or "", apart.content) == split(inline.content)
    chunks = list(
        client.chat.completions.create(**ask, stream=True, extra_body={"reasoning_format": "split"})
    )
    thought = "".join(getattr(chunk.choices[0].delta, "reasoning_content", None) or "" for chunk in chunks)
    assert thought == apart.reasoning_content
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == apart.content


def test_the_server_s_own_choice_is_split_where_it_was_told_so(thinker):
    server = Running(thinker, reasoning_format="split")
    try:
        message = server.client().chat.completions.create(**ASK).choices[0].message
        assert message.reasoning_content and "<think>" not in message.content
    finally:
        server.close()


def test_a_template_with_a_switch_thinks_or_does_not(tmp_path):
    from kitae.models.toy import CHAT_TEMPLATE, make_model, make_tokenizer

    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("strip_thinking", "false").replace(
        "prefill }}", "('<think>\\n' if enable_thinking else '<think>\\n\\n</think>\\n\\n') }}"
    )
    server = Running(make_model(tmp_path / "switch", "qwen3", tokenizer=tokenizer))
    try:
        client = server.client()

        def said(**kwargs):
            return client.chat.completions.create(
                **ASK, extra_body={"chat_template_kwargs": kwargs} if kwargs else None
            )

        default, on, off = said(), said(thinking=True), said(enable_thinking=False)
        assert default.choices[0].message.content == on.choices[0].message.content
        assert on.choices[0].message.content.startswith("<think>\n")
        assert not off.choices[0].message.content.startswith("<think>")
        assert off.usage.prompt_tokens == on.usage.prompt_tokens + 4
        status, error = server.refused(
            "/v1/chat/completions",
            {
                "messages": ASK["messages"],
                "chat_template_kwargs": {"thinking": True, "enable_thinking": False},
            },
        )
        assert status == 400 and "contradict" in error["message"]
    finally:
        server.close()
