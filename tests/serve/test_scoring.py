"""Log-likelihoods: echo with logprobs, as evaluation harnesses ask for them, against the plain model."""

import json
import socket
import threading
from urllib.parse import urlsplit

import pytest
import torch
from serving import KEY, wait_for

from kitae.serve import lanes

TEXT = "/v1/completions"
GIVEN = {"model": "tiny", "temperature": 0, "max_tokens": 1, "logprobs": 1, "echo": True, "seed": 1234}


@pytest.fixture(scope="module")
def plain(thinker):
    """The model as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(thinker)


def by_the_model(plain, ids):
    """Log-probabilities of ids[1:], and the likeliest token of each place."""
    with torch.no_grad():
        logits = plain(torch.tensor([ids])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return logprobs[torch.arange(len(ids) - 1), ids[1:]].tolist(), logprobs.argmax(-1).tolist()


def test_echoed_prompts_have_the_model_s_log_probabilities(running, plain):
    encode = running.opened.template.tokenizer.encode
    prompts = [
        encode("the sum of 2 and 2 is 4"),
        encode("x"),
        encode("1+1=2, 2+2=4, 3+3=6"),
        encode("<|im_end|>a<think>"),
    ]
    answer = running.ask("POST", TEXT, {**GIVEN, "prompt": prompts})
    choices = json.loads(answer[2])["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2, 3]
    for ids, choice in zip(prompts, choices, strict=True):
        found = choice["logprobs"]
        expected, greedy = by_the_model(plain, ids)
        assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
        assert found["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-5)
        assert len(found["tokens"]) == len(ids) + 1
        for place, logprob in enumerate(found["token_logprobs"][1:-1]):
            is_greedy = logprob == max(found["top_logprobs"][place + 1].values())
            assert is_greedy == (greedy[place] == ids[place + 1])
        assert found["tokens"][-1] == running.opened.template.tokenizer.decode([greedy[-1]])
    # Token ids and text are the same prompt, alone or among others.
    one = json.loads(running.ask("POST", TEXT, {**GIVEN, "prompt": "the sum of 2 and 2 is 4"})[2])["choices"][
        0
    ]
    assert one["logprobs"]["token_logprobs"][1:] == pytest.approx(
        choices[0]["logprobs"]["token_logprobs"][1:], abs=1e-6
    )
    assert one["text"].startswith("the sum of 2 and 2 is 4")


def test_nothing_is_sampled_where_no_token_is_asked_for(running):
    ask = {**GIVEN, "max_tokens": 0, "prompt": "1+1"}
    choice = json.loads(running.ask("POST", TEXT, ask)[2])
    assert choice["choices"][0]["text"] == "1+1" and choice["usage"]["completion_tokens"] == 0
    assert len(choice["choices"][0]["logprobs"]["tokens"]) == 3
    assert json.loads(running.ask("POST", TEXT, {**ask, "logprobs": None})[2])["choices"][0]["text"] == "1+1"
    assert b'"text":"1+1"' in running.ask("POST", TEXT, {**ask, "stream": True})[2]
    assert running.refused(TEXT, {**ask, "echo": False})[0] == 400


def test_scoring_takes_turns_fills_the_queue_and_ends_with_its_client(running, client, monkeypatch):
    """Prompts that are only scored must neither hold up what is sampled, nor wait without end, nor go on for nobody."""
    passes, permits, late = [], threading.Semaphore(0), []
    whole = lanes._score_pass

    def held(*args):
        """A pass that ends when it may; where it waits for too long, the rest do not wait."""
        passes.append(args)
        if not late and not permits.acquire(timeout=60):
            late.append(len(passes))
        return whole(*args)

    monkeypatch.setattr(lanes, "_score_pass", held)
    monkeypatch.setattr(lanes, "SCORED_TOKENS", 1)
    ask = {**GIVEN, "max_tokens": 0, "prompt": ["1+1"] * 60}
    assert running.refused(TEXT, {**ask, "prompt": ["1+1"] * 80})[1]["param"] == "n"
    body = json.dumps(ask)
    host, port = urlsplit(running.url).netloc.split(":")
    connection = socket.create_connection((host, int(port)))
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall((head + body).encode())
    assert wait_for(lambda: passes) and running.engine.num_open == 60
    assert running.refused(TEXT, {**ask, "prompt": ["1+1"] * 20})[0] == 429
    said = []
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    thread = threading.Thread(target=lambda: said.append(client.chat.completions.create(**chat)))
    thread.start()
    assert wait_for(lambda: running.engine.num_open == 61)
    permits.release(30)
    thread.join()
    assert said[0].usage.completion_tokens <= 2 and len(passes) <= 31 and not late
    connection.close()
    assert wait_for(lambda: running.engine.num_open == 0)
    count = len(passes)
    permits.release(60)
    client.chat.completions.create(**chat)  # passes would take turns with its steps
    assert len(passes) <= count + 1 < 60 and not late
