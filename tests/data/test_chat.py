import random
from collections import Counter

import pytest

from kitae.config import DataSettings
from kitae.data.chat import THINKING_ON, Template
from kitae.data.formats import Example
from kitae.data.instructions import INSTRUCTIONS, form_instruction, language_of
from kitae.errors import ConfigError, DataError, ModelError
from kitae.models.toy import make_tokenizer

PREFILLED = {"prefill": "<think>\n", "strip_thinking": True}


def conversation(*contents: str, system: str | None = None) -> list[dict]:
    turns = [{"role": "system", "content": system}] if system else []
    return turns + [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


def toy(
    *, prefill: str = "", strip_thinking: bool = False, chat_template: str | None = None, **settings
) -> Template:
    tokenizer = make_tokenizer(prefill=prefill, strip_thinking=strip_thinking)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return Template.load(tokenizer, data=DataSettings(**settings))


@pytest.fixture
def rows_of(shown):
    def render(template: Template, messages: list[dict], *, max_length: int = 10_000) -> list[str]:
        rows = template.rows(Example(messages=messages), max_length=max_length)
        return [shown(template, row) for row in rows]

    return render


# what is taught -----------------------------------------------------------------------------------------------


def test_all_assistant_turns_and_their_end_tokens_are_taught_in_one_row(rows_of):
    assert rows_of(toy(), conversation("a", "b", "c", "d", system="s")) == [
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n[[b<|im_end|>]]\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n[[d<|im_end|>]]"
    ]


def test_a_template_that_drops_earlier_thinking_gives_a_row_for_each_turn(rows_of):
    messages = conversation("a", "<think>x</think>b", "c", "<think>\ny</think>d")
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert rows_of(toy(**PREFILLED), messages) == [
        start + "<think>\n[[x</think>b<|im_end|>]]",
        start + "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
        "<think>\n[[y</think>d<|im_end|>]]",
    ]


def test_a_turn_without_reasoning_gets_an_empty_block_after_a_think_prefill(rows_of):
    assert rows_of(toy(**PREFILLED), conversation("a", "b")) == [
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>\n[[\n</think>\n\nb<|im_end|>]]"
    ]


def test_the_real_r1_template_teaches_each_turn_as_it_would_be_sampled(r1, rows_of):
    template = Template.load(r1, data=DataSettings())
    assert (template.prefill, template.stop_ids) == ("<think>\n", [151643])
    found = rows_of(
        template, conversation("2+2?", "<think>Two twos.</think>4", "Sure?", "Yes.", system="Add.")
    )
    start = "<｜begin▁of▁sentence｜>Add.<｜User｜>2+2?<｜Assistant｜>"
    assert found == [
        start + "<think>\n[[Two twos.</think>4<｜end▁of▁sentence｜>]]",
        start
        + "4<｜end▁of▁sentence｜><｜User｜>Sure?<｜Assistant｜><think>\n[[\n</think>\n\nYes.<｜end▁of▁sentence｜>]]",
    ]


def test_the_v3_template_prefills_nothing(rows_of, load_real):
    template = Template.load(load_real("DeepSeek-V3-R1"), data=DataSettings())
    assert template.prefill == ""
    assert rows_of(template, conversation("a", "<think>x</think>b")) == [
        "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>[[<think>x</think>b<｜end▁of▁sentence｜>]]"
    ]


EMPTY_BLOCKS = {
    "Qwen-Qwen3-0.6B": ("", "<think>\n\n</think>\n\nb"),
    "Qwen-QwQ-32B": ("<think>\n", "\n</think>\n\nb"),
    "deepseek-ai-DeepSeek-V3.1": ("<think>", "</think>b"),
    "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B": ("<think>\n", "\n</think>\n\nb"),
    "Qwen-Qwen2.5-7B-Instruct": ("", "b"),
    "meta-llama-Llama-3.1-8B-Instruct": ("", "b"),
}


@pytest.mark.parametrize("name", EMPTY_BLOCKS)
def test_prefill_and_empty_block_are_read_from_each_template(r1, shared_data, shown, name):
    template = Template.load(
        r1, data=DataSettings(template=str(shared_data / "templates" / "2026" / f"{name}.jinja"))
    )
    prefill, completion = EMPTY_BLOCKS[name]
    assert template.prefill == prefill
    (row,) = template.rows(Example(messages=conversation("a", "b")), max_length=1000)
    assert shown(template, row).partition("[[")[2] == completion + "<｜end▁of▁sentence｜>]]"


def test_every_reasoning_turn_reads_back_as_it_was_written(real_tokenizer, shared_data):
    """What rewards see of a taught turn, prefill and completion, is the turn: `<think>` survives."""
    paths = [None, *(shared_data / "templates" / "2026").glob("*.jinja")]
    for path in paths:
        if path is None and real_tokenizer.chat_template is None:
            continue
        template = Template.load(real_tokenizer, data=DataSettings(template=path and str(path)))
        content = "<think>a < b, so\n\n  東京</think>\n\n<answer>4</answer>"
        prompt, prefill = template.prompt(conversation("q"))
        (row,) = template.rows(Example(messages=conversation("q", content)), max_length=1000)
        assert row.token_ids[: row.prompt_length] == prompt
        taught = [i for i, m in zip(row.token_ids, row.loss_mask, strict=True) if m]
        text = template.text_of(taught, prefill)
        assert text.replace("<think>\n", "<think>") == content, path


def test_training_and_sampling_see_the_same_tokens(r1):
    template = Template.load(r1, data=DataSettings())
    example = Example(messages=conversation("q", "<think>r</think><answer>4</answer>"), answer="4")
    problem = template.problem(example, index=7, max_length=None)
    (row,) = template.rows(example, max_length=1000)
    completion = template.encode_completion("r</think><answer>4</answer>")
    assert row.token_ids == problem.token_ids + completion + [151643]
    assert (problem.prompt, problem.answer, problem.prefill, problem.index) == ("q", "4", "<think>\n", 7)
    assert row.loss_mask == [False] * len(problem.token_ids) + [True] * (len(completion) + 1)


def test_the_mask_is_by_position_where_pad_equals_eos(r1):
    assert r1.pad_token_id == r1.eos_token_id
    template = Template.load(r1, data=DataSettings())
    rows = template.rows(Example(messages=conversation("a", "b", "c", "d")), max_length=1000)
    for row in rows:
        ends = [m for i, m in zip(row.token_ids, row.loss_mask, strict=True) if i == r1.eos_token_id]
        assert ends == [False] * (len(ends) - 1) + [True]


def test_a_turn_that_is_context_only_is_not_taught(rows_of):
    messages = conversation("a", "b", "c", "d")
    messages[1]["taught"] = False
    (text,) = rows_of(toy(), messages)
    assert text.count("[[") == 1
    assert text.endswith("[[d<|im_end|>]]")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("<think>never closed", "opens <think> and never closes it"),
        ("First <think>x</think>b", "starts each turn with <think>; this one has text before it"),
    ],
)
def test_a_turn_that_cannot_be_taught_is_refused_with_its_line(content, reason):
    with pytest.raises(DataError, match=f"rows.jsonl:3: .*{reason}"):
        toy(**PREFILLED).rows(
            Example(messages=conversation("a", content), source="rows.jsonl:3"), max_length=100
        )


def test_reasoning_is_refused_where_the_template_closes_the_block_itself():
    template = toy(prefill="<think>\n\n</think>\n\n")
    assert template.prefill == "<think>\n\n</think>\n\n"
    with pytest.raises(DataError, match="starts each turn with a closed think block"):
        template.rows(Example(messages=conversation("a", "<think>x</think>b")), max_length=100)


def test_a_tokenizer_that_loses_think_refuses_rows_with_reasoning():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2, "</s>": 3}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="?")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    template = Template.load(tokenizer, data=DataSettings())
    assert not template.keeps_think
    assert template.rows(Example(messages=conversation("a", "b")), max_length=9)
    with pytest.raises(DataError, match="cannot write <think>"):
        template.rows(Example(messages=conversation("a", "<think>a</think>b")), max_length=99)


# length -------------------------------------------------------------------------------------------------------


def test_what_max_length_cuts_is_counted():
    template = toy()
    messages = conversation("q", "<think>abc</think><answer>4</answer>")
    (whole,) = template.rows(Example(messages=messages), max_length=1000)
    prompt = whole.prompt_length
    results = {}
    for max_length in (len(whole.token_ids), len(whole.token_ids) - 1, prompt + 3, prompt):
        counts: Counter[str] = Counter()
        rows = template.rows(Example(messages=messages), max_length=max_length, counts=counts)
        results[max_length - prompt] = ([row.token_ids for row in rows], dict(counts))
    n, ids = len(whole.token_ids) - prompt, whole.token_ids
    assert results == {
        n: ([ids], {}),
        n - 1: ([ids[:-1]], {"rows_cut": 1}),
        3: ([ids[: prompt + 3]], {"rows_cut": 1, "answers_cut": 1}),
        0: ([], {"rows_cut": 1, "answers_cut": 1, "rows_dropped": 1}),
    }


def test_a_prompt_longer_than_the_limit_is_no_problem_to_sample():
    template = toy()
    example = Example(messages=conversation("1+1?"), answer="2", columns={"level": 1}, source="f:1")
    length = len(template.problem(example, index=0, max_length=None).token_ids)
    assert template.problem(example, index=0, max_length=length).columns == {"level": 1}
    assert template.problem(example, index=0, max_length=length - 1) is None


# control tokens and the template ------------------------------------------------------------------------------


def test_control_tokens_in_text_stay_text_in_every_role(real_tokenizer, shared_data):
    data = DataSettings(template=str(shared_data / "templates" / "2026" / "Qwen-Qwen2.5-7B-Instruct.jinja"))
    template = Template.load(real_tokenizer, data=data)
    control = set(template._encoder.control_ids.values())
    benign = [i for i in template.prompt(conversation("a", "b", "c", system="s"))[0] if i in control]
    for literal in template._encoder.control_ids:
        if literal in ("<think>", "</think>"):
            continue
        contents = [f"a{literal}", f"{literal}b{literal}", literal]
        found, _ = template.prompt(conversation(*contents, system=f"x {literal}"))
        assert [i for i in found if i in control] == benign, literal


def test_control_tokens_in_text_are_counted():
    counts: Counter[str] = Counter()
    toy().rows(
        Example(messages=conversation("<|im_end|> <think>", "b <|pad|>")), max_length=999, counts=counts
    )
    assert counts == {"control_literals": 3}


def test_prompts_equal_those_of_transformers(r1, shared_data):
    rng = random.Random(0)
    words = ["hello", " ", "\n", "2 < 3", "東京", "é", "🤔", "  ", "\n\n", "`code`", "{{ x }}", "'"]

    def text() -> str:
        return "".join(rng.choices(words, k=rng.randint(1, 6))).strip() or "x"

    for path in [None, *sorted((shared_data / "templates").rglob("*.jinja"))]:
        template = Template.load(r1, data=DataSettings(template=path and str(path)))
        for _ in range(40):
            contents = [text() for _ in range(rng.choice([1, 3, 5]))]
            messages = conversation(*contents, system=rng.choice([None, text()]))
            expected = r1.apply_chat_template(
                messages,
                chat_template=template.text,
                add_generation_prompt=True,
                return_dict=True,
                **THINKING_ON,
                date_string="26 Jul 2024",
            )["input_ids"]
            assert template.prompt(messages)[0] == expected, (path, messages)


def test_template_switches_can_be_passed(load_real):
    template = Template.load(load_real("minimind"), data=DataSettings())
    assert template.prompt(conversation("a"))[1] == "<think>\n"
    assert template.prompt(conversation("a"), open_thinking=False)[1] == "<think>\n\n</think>\n\n"


def test_a_think_block_in_the_users_last_words_is_no_prefill():
    template = toy(chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert template.prompt(conversation("say <think>\n"))[1] == ""


def test_begin_of_sequence_is_written_once(real_tokenizer):
    for settings in ({"template": "alpaca"}, {}):
        if not settings and real_tokenizer.chat_template is None:
            continue
        template = Template.load(real_tokenizer, data=DataSettings(**settings))
        ids, _ = template.prompt(conversation("a", system="s"))
        assert ids[:2] != [real_tokenizer.bos_token_id] * 2


def test_a_template_that_writes_begin_of_sequence_twice_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = (
        "{{ bos_token + bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    with pytest.raises(ModelError, match="two begin-of-sequence tokens"):
        Template.load(tokenizer, data=DataSettings())


def test_sentencepiece_turns_join_as_the_whole_text_would(shown, load_real):
    template = Template.load(load_real("stories260K"), data=DataSettings(template="alpaca"))
    (row,) = template.rows(Example(messages=conversation("Hi", "Once upon a time")), max_length=500)
    text = template._render(conversation("Hi", "Once upon a time"), add_generation_prompt=False)
    assert row.token_ids == template.tokenizer(text.rstrip("\n"), add_special_tokens=False).input_ids


# templates from files, system prompts --------------------------------------------------------------------------


def test_alpaca_is_the_published_text(rows_of):
    (text,) = rows_of(toy(template="alpaca"), conversation("Name a prime.", "7"))
    assert text == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n"
        "### Instruction:\nName a prime.\n### Response:\n[[7<|im_end|>]]"
    )


def test_colossal_conversation_templates_are_honoured(r1, shared_data, rows_of, caplog):
    folder = shared_data / "sft" / "colossal" / "conversation_template"
    template = Template.load(r1, data=DataSettings(template=str(folder / "Qwen_Qwen2.5-3B.json")))
    assert template.stop_ids == [151643]
    assert template.system_prompt.startswith("You are a helpful assistant. The assistant first thinks")
    (text,) = rows_of(template, conversation("a", "b"))
    assert text.startswith("<|im_start|>system\nYou are a helpful assistant.")
    own = DataSettings(template=str(folder / "Qwen_Qwen2.5-3B.json"), system_prompt="Mine.")
    assert Template.load(r1, data=own).system_prompt == "Mine."
    other = Template.load(r1, data=DataSettings(template=str(folder / "llama2.json")))
    assert other.stop_ids == [151643]
    assert "stop_ids [2] are no control tokens of this tokenizer" in caplog.text
    for path in folder.glob("*.json"):
        assert Template.load(r1, data=DataSettings(template=str(path))).system_prompt


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", "{", "is not JSON"),
        ("a.json", "[]", "has no chat_template"),
        ("a.json", '{"chat_template": "x", "stop_ids": ["a"]}', "stop_ids whole numbers"),
        (
            "a.json",
            '{"chat_template": "x", "response_format_tags": {"a": {"text": "<r>"}}}',
            "response_format_tags",
        ),
        ("a.jinja", "{% for %}", "syntax error in line 1"),
        ("a.jinja", "{{ ''.__class__.__mro__ }}", "reaches for something it must not"),
        ("a.jinja", "x" * 70_000, "larger than 64 KiB"),
        ("a.jinja", "{{ nothing.at.all }}", "refuses this conversation"),
        ("a.jinja", "Hello", "does not write assistant turns"),
        ("a.jinja", b"\xff", "not UTF-8"),
    ],
)
def test_a_template_file_that_cannot_be_used_is_refused(tmp_path, name, content, reason):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ConfigError, ModelError), match=reason):
        toy(template=str(path))


def test_missing_templates_are_named():
    with pytest.raises(ConfigError, match="which is no file"):
        toy(template="nowhere.jinja")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"has no chat template; set data\.template"):
        Template.load(tokenizer, data=DataSettings())


def test_a_system_prompt_is_put_before_conversations_without_one(rows_of):
    template = toy(system_prompt="Be kind.")
    assert rows_of(template, conversation("a", "b"))[0].startswith("<|im_start|>system\nBe kind.<|im_end|>\n")
    assert rows_of(template, conversation("a", "b", system="s"))[0].startswith(
        "<|im_start|>system\ns<|im_end|>\n"
    )


@pytest.mark.parametrize("what", ["{{ raise_exception('no system role') }}", ""])
def test_a_template_without_system_role_gets_it_in_the_users_turn(what, rows_of):
    template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}" + what + "{% else %}"
        "{{ m['role'] + ':' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    found = rows_of(toy(chat_template=template, system_prompt="S\n"), conversation("a", "b"))
    assert found == ["user:S\n\na<|im_end|>assistant:[[b<|im_end|>]]"]


def test_a_templates_complaint_names_the_row():
    template = (
        "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
        + make_tokenizer().chat_template
    )
    example = Example(messages=conversation("a", "b", "c", "d"), source="f.jsonl:9")
    loaded = toy(chat_template=template)
    with pytest.raises(DataError, match=r"f\.jsonl:9: .* refuses this conversation: too long"):
        loaded.rows(example, max_length=99)


def test_the_form_instruction_speaks_the_language_of_the_data(r1):
    assert language_of(["How many eggs?", "Solve $x + 東 = 2$"]) == "en"
    assert language_of(["りんごが3個あります。", "全部で何個ですか。"]) == "ja"
    assert language_of(["小明有3个苹果，求 $\\frac{a}{b}$ 的值。"]) == "zh"
    assert language_of([]) == "en"
    for form, texts in INSTRUCTIONS.items():
        for text in texts.values():
            assert "<think>" in text
            assert ("\\boxed{}" if form == "boxed" else "<answer>") in text
    prompt = form_instruction(["全部で何個ですか。"])
    template = Template.load(r1, data=DataSettings(), default_system_prompt=prompt)
    assert r1.decode(template.prompt(conversation("q"))[0]).startswith(
        f"<｜begin▁of▁sentence｜>{prompt}<｜User｜>"
    )
    removed = Template.load(r1, data=DataSettings(system_prompt=""), default_system_prompt=prompt)
    assert removed.system_prompt is None


# saving -------------------------------------------------------------------------------------------------------


def test_a_saved_template_is_found_beside_the_tokenizer(tmp_path):
    from transformers import PreTrainedTokenizerFast

    template = toy(prefill="<think>\n", system_prompt="Think first.")
    template.save(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = Template.load(tokenizer, data=DataSettings(), default_system_prompt="not this one")
    assert again.system_prompt == "Think first."
    assert again.fingerprint == template.fingerprint
    assert again.differences(tmp_path) == []
    assert again.prompt(conversation("a")) == template.prompt(conversation("a"))
    other = Template.load(tokenizer, data=DataSettings(system_prompt="Else."))
    assert other.differences(tmp_path) == ["system_prompt was 'Think first.' and is 'Else.'"]
    tokenizer.chat_template += " "
    changed = Template.load(tokenizer, data=DataSettings())
    assert changed.differences(tmp_path) == ["the chat template or the control tokens changed"]
    (tmp_path / "kitae_template.json").write_text("{}")
    with pytest.raises(ModelError, match="is damaged"):
        Template.load(tokenizer, data=DataSettings())


def test_a_model_trained_without_a_system_prompt_is_given_none_by_default(tmp_path):
    from transformers import PreTrainedTokenizerFast

    toy().save(tmp_path)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    again = Template.load(tokenizer, data=DataSettings(), default_system_prompt="the form instruction")
    assert again.system_prompt is None
    assert Template.load(tokenizer, data=DataSettings(system_prompt="Else.")).system_prompt == "Else."


def test_a_folder_without_a_saved_template_differs_in_nothing(tmp_path):
    assert toy().differences(tmp_path) == []
