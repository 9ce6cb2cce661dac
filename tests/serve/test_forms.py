"""Answers held to a JSON schema: they parse and follow it, whatever runs beside them; no schema stops the server."""

import asyncio
import json
import random
import sys
import threading
import time

import pytest
from pydantic import BaseModel
from serving import Running

pytest.importorskip("llguidance")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
ASK = {"model": "tiny", "messages": [{"role": "user", "content": "2+2"}], "temperature": 1}


def form(schema):
    return {"type": "json_schema", "json_schema": {"name": "form", "schema": schema, "strict": True}}


def random_schema(numbers, depth=0):
    """A schema of the kinds that `follows` knows; what it allows is short, so that a random model gets to its end."""
    kinds = ["integer", "boolean", "null", "string", "enum"] + ["object", "array"] * (depth < 3)
    kind = numbers.choice(kinds)
    if kind == "object":
        properties = {f"k{i}": random_schema(numbers, depth + 1) for i in range(numbers.randrange(4))}
        required = [name for name in properties if numbers.random() < 0.7]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }
    if kind == "array":
        least = numbers.randrange(3)
        items = random_schema(numbers, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + numbers.randrange(2)}
    if kind == "integer":
        least = numbers.randrange(-1000, 1000)
        return {"type": "integer", "minimum": least, "maximum": least + numbers.randrange(500)}
    if kind == "string":
        return {"type": "string", "maxLength": numbers.randrange(6)}
    if kind == "enum":
        return {"enum": [numbers.choice(["a", "b c", '"}', 7, None, True]) for _ in range(2)]}
    return {"type": kind}


def follows(value, schema):
    """Whether a value follows a schema of `random_schema`, spelled out."""
    if "enum" in schema:
        return any(value == one and type(value) is type(one) for one in schema["enum"])
    kind = schema["type"]
    if kind == "object":
        known = schema["properties"]
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(known)
            and all(follows(value[name], known[name]) for name in value)
        )
    if kind == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(follows(item, schema["items"]) for item in value)
        )
    if kind == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    if kind == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    return value is None if kind == "null" else isinstance(value, bool)


@pytest.fixture(scope="module")
def plain(tiny):
    """A server whose model does not think."""
    server = Running(tiny("qwen3"))
    yield server
    server.close()


def test_every_answer_follows_its_random_schema_whole_and_streamed(plain):
    client = plain.client()
    num_ended = 0
    for number in range(20):
        schema = random_schema(random.Random(number))
        ask = {**ASK, "seed": number, "max_tokens": 400, "response_format": form(schema), "n": 2}
        texts = ["", ""]
        for chunk in client.chat.completions.create(**ask, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content
        answer = client.chat.completions.create(**ask)
        assert texts == [choice.message.content for choice in answer.choices]
        for choice in answer.choices:
            if choice.finish_reason == "stop":
                assert follows(json.loads(choice.message.content), schema), (schema, choice.message.content)
                num_ended += 1
    assert num_ended >= 36


def test_json_mode_gives_an_object_also_in_text_completions(plain):
    client = plain.client()
    asks = {"response_format": {"type": "json_object"}}
    for seed in range(5):
        answer = client.chat.completions.create(**ASK, **asks, seed=seed, max_tokens=1500).choices[0]
        assert answer.finish_reason == "length" or isinstance(json.loads(answer.message.content), dict)
    found = client.completions.create(
        model="tiny", prompt=["a", "b"], max_tokens=1500, extra_body=asks, seed=1, temperature=1
    )
    assert all(c.finish_reason == "length" or isinstance(json.loads(c.text), dict) for c in found.choices)
    assert any(c.finish_reason == "stop" for c in found.choices)


def test_the_client_s_parse_gives_objects_of_a_pydantic_model(client):
    class Person(BaseModel):
        name: str
        age: int
        tags: list[bool]

    message = (
        client.chat.completions.parse(**ASK, seed=1, max_tokens=2500, response_format=Person)
        .choices[0]
        .message
    )
    assert isinstance(message.parsed, Person)
    assert message.reasoning_content and "<think>" not in message.content, (
        "content that parses has no thinking"
    )
    with pytest.raises(Exception, match="length limit was reached"):
        client.chat.completions.parse(**ASK, seed=1, max_tokens=3, response_format=Person)


def test_thinking_comes_before_the_form_and_inline_only_where_asked(client):
    ask = {**ASK, "seed": 1, "max_tokens": 1500, "response_format": form({"enum": ["yes", "no"]})}
    apart = client.chat.completions.create(**ask).choices[0]
    assert apart.finish_reason == "stop" and json.loads(apart.message.content) in ("yes", "no")
    inline = client.chat.completions.create(**ask, extra_body={"reasoning_format": "inline"}).choices[0]
    thought, closing, content = inline.message.content.partition("</think>")
    assert thought.startswith("<think>\n") and closing and content.strip() == apart.message.content


def constraint_of(server, schema, thinking):
    from kitae.serve.forms import Forms
    from kitae.serve.tokens import TokenTexts

    template = server.opened.template
    forms = Forms(TokenTexts(template.tokenizer), stop_ids=template.stop_ids)
    return asyncio.run(forms.compile(schema, thinking=thinking))()


def may_come(constraint, server):
    import torch

    logits = torch.zeros(server.opened.policy.config.vocab_size)
    constraint.mask_(logits)
    assert constraint.failure is None
    return set((logits == 0).nonzero()[:, 0].tolist())


@pytest.mark.parametrize(
    ("thinking", "said", "continues"),
    [
        ("must", ["h", "m", "</think>", "\n", " ", "\n", "\n"], {"4"}),  # no white space for ever
        ("must", [*"hm", *"</think>"], {"4", "\n", " "}),  # the tag spelled out letter by letter
        ("may", [], {"4", "<think>", "<"}),
        ("may", ["<think>", "</think>"], {"4", "\n", " "}),
        ("none", [], {"4"}),
        ("none", ["4"], {"<|im_end|>", "2"}),
        ("none", ["4", "2"], {"<|im_end|>"}),
    ],
)
def test_what_may_come_at_each_place(plain, thinking, said, continues):
    ids = plain.opened.template.tokenizer.convert_tokens_to_ids
    constraint = constraint_of(plain, {"enum": [4, 42]}, thinking)
    for token in said:
        assert ids(token) in may_come(constraint, plain)
        constraint.accept(ids(token))
    assert may_come(constraint, plain) == {ids(token) for token in continues}


def test_no_control_token_and_no_end_comes_before_the_form_is_complete(plain):
    tokenizer = plain.opened.template.tokenizer
    ids = tokenizer.convert_tokens_to_ids
    constraint = constraint_of(plain, {"type": "string"}, "must")
    for token in ["a", "</think>", '"', "b"]:
        assert not may_come(constraint, plain) & {
            ids(t) for t in ("<|im_end|>", "<|im_start|>", "<|pad|>", "user\n")
        }
        assert not constraint.accept(ids(token))
    assert constraint.accept(ids('"')), "nothing can follow: the completion ends without an end token"


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_log_probabilities_are_those_of_the_tokens_that_may_come(plain, temperature):
    import torch

    from kitae.types import Packing, Segment

    template, policy = plain.opened.template, plain.opened.policy
    ids = template.tokenizer.convert_tokens_to_ids
    prompt = [ids(c) for c in "2+2="]
    asks = {"response_format": form({"enum": ["ab", "cd", "xy"]})}
    found = plain.client().completions.create(
        model="tiny", prompt=prompt, seed=4, max_tokens=9, logprobs=5, temperature=temperature, top_p=1, extra_body=asks
    ).choices[0]  # fmt: skip
    row = torch.tensor([*prompt, ids('"')])
    packing = Packing(segments=[Segment(0, len(row))], num_tokens=len(row))
    with torch.no_grad():
        logits = policy.logits(policy.hidden(row, torch.arange(len(row)), packing))[-1]
    wanted = (logits[[ids(c) for c in "acx"]] / (temperature or 1)).log_softmax(0).tolist()
    said = found.logprobs
    assert said.top_logprobs[1] == pytest.approx(dict(zip("acx", wanted, strict=True)), abs=1e-4)
    assert said.token_logprobs[1] == pytest.approx(said.top_logprobs[1][said.tokens[1]])
    assert [said.token_logprobs[i] for i in (0, 2, 3)] == pytest.approx([0, 0, 0], abs=1e-6)
    assert json.loads(found.text) in ("ab", "cd", "xy") and len(said.tokens) == 4


@pytest.mark.parametrize("engine", ["generic", "native"])
def test_constrained_rows_leave_their_neighbours_alone(engine, tiny, request):
    if engine == "native":
        request.getfixturevalue("kernels")
    server = Running(tiny("qwen3"), engine=engine)
    nine = {"type": "array", "items": {"type": "integer"}, "minItems": 9, "maxItems": 9}
    free = {**ASK, "seed": 2, "max_tokens": 60}
    bound = {**ASK, "seed": 3, "max_tokens": 300, "response_format": form(nine)}
    try:

        async def together():
            async with server.aclient() as client:
                asks = [free, bound] * 3
                answers = await asyncio.gather(*(client.chat.completions.create(**ask) for ask in asks))
                return [answer.choices[0].message.content for answer in answers]

        alone = [
            server.client().chat.completions.create(**ask).choices[0].message.content for ask in (free, bound)
        ]
        assert asyncio.run(together()) == alone * 3
        assert len(json.loads(alone[1])) == 9
    finally:
        server.close()


def test_a_stop_string_still_ends_an_answer(plain):
    ask = {"model": "tiny", "prompt": "a", "max_tokens": 50, "seed": 1}
    ask["extra_body"] = {"response_format": form({"const": {"key": "value"}})}
    full = plain.client().completions.create(**ask).choices[0].text
    assert json.loads(full) == {"key": "value"}
    cut = plain.client().completions.create(**ask, temperature=0, stop=["val"]).choices[0]
    assert "".join(cut.text.split()) == '{"key":"' and cut.finish_reason == "stop"


NESTED = {"type": "integer"}
for _ in range(150):
    NESTED = {"type": "array", "items": NESTED}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "strnig"}, "Invalid type: strnig"),
        ({"properties": 5}, "properties must be an object"),
        ({"type": "array", "uniqueItems": True}, 'Unimplemented keys: ["uniqueItems"]'),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum (3)"),
        ({"$ref": "http://127.0.0.1:1/x.json"}, "does not fetch resources"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "NoExtension"),
        (NESTED, "recursion limit"),
        ({"enum": ["x" * 70_000]}, "65,536 are allowed"),
        ({"const": "\u00e9"}, "could not be followed to the end"),  # this tokenizer cannot write it
        ({"type": "object", "properties": {f"p{i}": {} for i in range(1000)}}, "max is 2000"),
    ],
)
def test_a_schema_that_cannot_be_followed_is_refused_and_says_why(plain, schema, said):
    began = time.process_time()
    # A chat's answer may think first, and then never comes to the schema.
    ask = {"model": "tiny", "prompt": "2+2", "temperature": 1, "max_tokens": 400}
    status, error = plain.refused(TEXT, {**ask, "response_format": form(schema)})
    assert status == 400 and said in error["message"], error
    assert time.process_time() - began < 5
    assert plain.client().chat.completions.create(**ASK, max_tokens=2).usage.completion_tokens <= 2
    assert plain.engine.num_open == 0


@pytest.mark.parametrize(
    ("format", "param", "said"),
    [
        ({"type": "xml"}, "response_format.type", "input should be"),
        ({"type": "json_schema"}, "response_format", "needs it"),
        (
            {"type": "json_object", "json_schema": {"name": "x", "schema": {}}},
            "response_format",
            "belongs to",
        ),
        (
            {"type": "json_schema", "json_schema": {"schema": {}}},
            "response_format.json_schema.name",
            "required",
        ),
        (
            {"type": "json_schema", "json_schema": {"name": "x"}},
            "response_format.json_schema.schema",
            "required",
        ),
    ],
)
def test_a_wrong_response_format_is_named(plain, format, param, said):
    status, error = plain.refused(CHAT, {**ASK, "response_format": format})
    assert (status, error["param"]) == (400, param) and said in error["message"], error


def test_banned_runs_of_tokens_contradict_a_form(plain):
    body = {**ASK, "response_format": {"type": "json_object"}, "no_repeat_ngram_size": 3}
    status, error = plain.refused(CHAT, body)
    assert (status, error["param"]) == (400, "no_repeat_ngram_size")


def test_the_server_answers_others_while_it_compiles_a_large_schema(plain):
    large = form({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(1500)}})
    statuses = []
    body = {"prompt": "a", "response_format": large, "max_tokens": 9}
    thread = threading.Thread(target=lambda: statuses.append(plain.ask("POST", TEXT, body)[0]))
    thread.start()
    slowest = 0.0
    while thread.is_alive():
        began = time.process_time()  # of the compiling thread too; a busy machine takes others' time
        assert plain.ask("GET", "/health", key=None)[0] == 200
        slowest = max(slowest, time.process_time() - began)
    assert slowest < 1 and statuses[0] in (200, 400)


def test_without_the_library_the_request_is_told_what_to_install(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    status, error = plain.refused(CHAT, {**ASK, "response_format": {"type": "json_object"}})
    assert status == 400 and "pip install 'kitae[serve]'" in error["message"]


def test_a_schema_as_deep_as_json_may_be_is_refused_as_one():
    """Python reads some that it cannot write from where it stands by then."""
    from kitae.serve.forms import Forms
    from kitae.serve.refusals import Refusal

    schema: dict = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(Refusal, match="nested too deeply"):
        asyncio.run(Forms.compile(None, schema, thinking="none"))


def test_a_constraint_that_cannot_be_made_leaves_nothing_in_the_session(plain):
    from kitae.config import SamplingSettings
    from kitae.serve.engine import Job, Ticket
    from kitae.types import Problem

    def fail():
        raise MemoryError

    async def ask():
        problem = Problem(prompt="", token_ids=[5, 6], index=0)
        how = {"sampling": SamplingSettings(max_new_tokens=3000), "seed": 0, "new_constraint": fail}
        ticket = Ticket(
            lane="tiny", jobs=[Job(problem=problem, limits=[3000], **how)], loop=asyncio.get_running_loop()
        )
        plain.engine.submit(ticket)
        assert isinstance(await asyncio.wait_for(ticket.queue.get(), 60), MemoryError)
        plain.engine.cancel(ticket)

    asyncio.run(ask())
    assert plain.engine.num_running == plain.engine.num_open == 0
    assert all(session.is_idle for session in plain.engine._sessions.values())
