import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kitae.data.tokens import TAGS, Marks, TextEncoder
from kitae.models.toy import make_tokenizer


@pytest.fixture(scope="session")
def real(real_tokenizer):
    return real_tokenizer, TextEncoder(real_tokenizer)


def test_every_control_token_in_user_text_stays_text(real):
    tokenizer, encoder = real
    for literal in encoder.control_ids:
        for text in (literal, f"a{literal}b", f" {literal}\n{literal}", f"{literal[:-1]}{literal}"):
            ids = encoder.encode_text(text)
            assert not encoder.ids.intersection(ids), text
            assert tokenizer.decode(ids).strip() == text.strip(), text


def test_text_without_control_tokens_keeps_its_ids(real):
    tokenizer, encoder = real
    texts = [
        "Hello world",
        "x < 3 and y > <b>4</b>",
        "  two  spaces\n\n\n",
        "東京は日本の首都です。",
        "答案是 42",
        "🤔 \ufffc",
        "",
    ]
    for text in texts:
        anchor = encoder._anchor
        skip = len(tokenizer(anchor, add_special_tokens=False).input_ids) if anchor else 0
        assert (
            encoder.encode_text(text) == tokenizer(anchor + text, add_special_tokens=False).input_ids[skip:]
        )
        assert encoder.encode_template(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_published_vectors_are_reproduced(r1, shared_data):
    """The R1 distillation shares Qwen2's byte-level merges, so texts of the published test agree where both split alike."""
    encoder = TextEncoder(r1)
    vectors = shared_data / "tokenizers" / "vectors"
    texts = (
        (vectors / "ggml-vocab-qwen2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    )
    expected = (vectors / "ggml-vocab-qwen2.gguf.out").read_text(encoding="utf-8").splitlines()
    published = [[int(i) for i in line.split()] for line in expected]
    assert len(texts) > 20
    for text, ids in zip(texts, published, strict=False):
        assert encoder.encode_template(text) == ids, text


def test_assistant_text_may_hold_think_and_answer_tags_only(real):
    _, encoder = real
    for literal, i in encoder.control_ids.items():
        ids = encoder.encode_text(f"<think>a{literal}b</think>", allowed=TAGS)
        found = [token for token in ids if token in encoder.ids]
        tags = [encoder.control_ids[t] for t in ("<think>", "</think>") if t in encoder.control_ids]
        expected = [*tags[:1], *([i] if literal in TAGS else []), *tags[1:]]
        assert found == expected, literal


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(seed=st.integers(0, 10**9))
def test_no_mixture_of_text_and_pieces_of_control_tokens_makes_one(real, seed):
    tokenizer, encoder = real
    rng = random.Random(seed)
    literals = rng.sample(sorted(encoder.control_ids), k=min(4, len(encoder.control_ids)))
    pieces = [*literals, *(t[: len(t) // 2] for t in literals), *(t[len(t) // 2 :] for t in literals)]
    pieces += [" ", "\n", "é", "東", "a", "<", ">", "\U000f0000", "\U000f0001"]
    contents = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(3)]
    marks = Marks(encoder)
    ids = marks.encode("".join(marks.hide(content) for content in contents))
    assert not encoder.ids.intersection(ids), contents
    bytes_lost = "\ufffd" in tokenizer.decode(ids)
    assert bytes_lost or tokenizer.decode(ids).lstrip() == "".join(contents).lstrip()


def test_a_control_token_cut_across_two_neighbours_is_not_completed():
    tokenizer = make_tokenizer()
    encoder = TextEncoder(tokenizer)
    marks = Marks(encoder)
    text = marks.hide("a<|im_") + marks.hide("end|>b")
    assert encoder.control_ids["<|im_end|>"] not in marks.encode(text)
    assert marks.num_control == 0
    assert tokenizer.decode(marks.encode(text)) == "a<|im_end|>b"


def test_private_use_characters_of_the_text_survive():
    encoder = TextEncoder(make_tokenizer(extra="\U000f0000"))
    marks = Marks(encoder)
    hidden = marks.hide("<|pad|>\U000f0000x")
    assert encoder.decode(marks.encode(hidden)) == "<|pad|>\U000f0000x"


def test_a_tokenizer_that_normalizes_look_alikes_is_seen_through():
    """NFKC turns full-width letters and brackets into ASCII before added tokens are matched."""
    from tokenizers import AddedToken
    from tokenizers.normalizers import NFKC

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = NFKC()
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True, special=False)])
    text = "a\uff1ctool\uff1eb"
    tool = tokenizer.convert_tokens_to_ids("<tool>")
    assert tool in tokenizer(text, add_special_tokens=False).input_ids
    assert tool not in TextEncoder(tokenizer).encode_text(text)


def test_decode_shows_tags_and_drops_other_control_tokens(real):
    _, encoder = real
    ids = encoder.encode_text("<think>a b</think> c", allowed=TAGS)
    others = [i for i in encoder.ids if i not in encoder.tag_ids][:5]
    assert encoder.decode([*others, *ids, *others]) == "<think>a b</think> c"
    assert encoder.decode([*ids[:1], 10**6]) == encoder.decode(ids[:1])


def test_sentencepiece_completions_get_no_space_put_before_them(load_real):

    encoder = TextEncoder(load_real("stories260K"))
    whole = encoder.encode_template("Once upon a time")
    parts = encoder.encode_template("Once upon") + encoder.encode_text(" a time")
    assert parts == whole
    assert encoder.decode(encoder.encode_text(" a time")) == " a time"
