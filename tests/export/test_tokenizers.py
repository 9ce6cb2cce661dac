"""Tokenizers in GGUF: pre-tokenizers found by what they do, and llama.cpp's token ids those of the tokenizer."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kitae.cli.main import main
from kitae.config import ModelSettings
from kitae.errors import ModelError
from kitae.export.convert import How
from kitae.export.gguf import write_gguf
from kitae.export.gguf_vocab import vocabulary
from kitae.export.pretokenizers import EXPRESSIONS, PROBES, find_pretokenizer
from kitae.export.verify import verify
from kitae.export.verify_llama import run_llama_cpp
from kitae.models.load import load_tokenizer
from kitae.models.toy import make_model, make_tokenizer

pytest.importorskip("gguf")
ALPACA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}{% else %}"
    "{{ '### Instruction:\\n' + m['content'] + '\\n### Response:\\n' }}{% endif %}{% endfor %}"
)
MORE = (
    "",
    "a",
    " ",
    "\n",
    "\n\n\n",
    "<think>",
    "x<think>y</think> z",
    "1+1=2",
    "Ünï\u00e7ödé \u6771\u4eac\u90fd 12345",
)


def byte_level(expressions: list[str], *, size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on the probes, that cuts text by these expressions."""
    core = Tokenizer(models.BPE())
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in expressions]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|pad|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(PROBES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<|pad|>", eos_token="<|end|>")


def ids_of_llama_cpp(path, texts) -> list[list[int]]:
    pytest.importorskip("xllamacpp")
    job = {
        "path": str(path), "context": 64, "threads": 1, "sequences": [[[1], []]], "top": 1, "max_tokens": 1, "stop_ids": [],
        "texts": list(texts), "add_special": False, "conversations": [],
    }  # fmt: skip
    return run_llama_cpp(job)["tokens"]


def check(tokenizer, tmp_path, texts=(*PROBES, *MORE), **how) -> None:
    """llama.cpp cuts every text into the tokenizer's own ids."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "bos_token_id": tokenizer.bos_token_id,
    }
    folder = make_model(tmp_path / "model", "llama", tokenizer=tokenizer, **sizes)
    write_gguf(str(folder), How(output=tmp_path / "m.gguf"), kind="q8_0", **how)
    found = ids_of_llama_cpp(tmp_path / "m.gguf", texts)
    wanted = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    unlike = [(text, a, b) for text, a, b in zip(texts, found, wanted, strict=True) if a != b]
    assert not unlike, unlike[0]


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_a_pretokenizer_is_known_by_what_it_does(name, tmp_path):
    tokenizer = byte_level(EXPRESSIONS[name])
    assert find_pretokenizer(tokenizer.backend_tokenizer) == name
    check(tokenizer, tmp_path)


def test_the_gate_finds_a_pretokenizer_that_cuts_otherwise(tmp_path):
    tokenizer = byte_level(EXPRESSIONS["qwen2"])
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "bos_token_id": None}
    folder = make_model(tmp_path / "model", "llama", tokenizer=tokenizer, **sizes)
    for pre, is_right in (("qwen2", True), ("llama-bpe", False)):
        output = tmp_path / f"{pre}.gguf"
        write_gguf(str(folder), How(output=output), kind="f32", pre_tokenizer=pre)
        [row] = [row for row in verify(str(folder), [output])["rows"] if row["name"] == output.name]
        told = "tokenizer.ggml.pre is llama-bpe, which cuts '1 22 333 4444 1234567' otherwise than qwen2"
        assert (told in row["failures"]) != is_right
        # Its random weights say parts of characters too, of which llama.cpp tells nothing by itself.
        assert not is_right or not row["failures"]


def test_an_unknown_pretokenizer_is_refused_unless_one_is_named(tmp_path):
    tokenizer = byte_level(["[aeiou]"])
    with pytest.raises(ModelError, match=r"cuts text as this tokenizer does; the nearest, .* such as"):
        vocabulary(tokenizer, size=512)
    assert vocabulary(tokenizer, size=512, pre="default").pre == "default"


def test_a_tokenizer_of_characters_keeps_its_ids_beyond_ascii_too(tmp_path):
    tokenizer = make_tokenizer(extra="\u00e9\u6771\U0001f600")
    texts = [
        "caf\u00e9 \u6771\u6771x",
        "\U0001f600\u00e9",
        "<think>1 + 1</think>\n<answer>2</answer>",
        "user\nassistant",
    ]
    check(tokenizer, tmp_path, texts)


def test_kinds_of_tokenizers_that_have_no_place_are_refused():
    core = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    with pytest.raises(ModelError, match="tokenizer of type WordPiece"):
        vocabulary(PreTrainedTokenizerFast(tokenizer_object=core), size=2)


@pytest.mark.parametrize(
    ("name", "pre"),
    [("DeepSeek-R1-Distill-Qwen", "qwen2"), ("DeepSeek-V3-R1", "deepseek-v3"), ("minimind", "gpt-2")],
)
def test_real_tokenizers_keep_their_ids_in_llama_cpp(name, pre, shared_data, tmp_path):
    folder = shared_data / "tokenizers" / name
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(folder), tokenizer=str(folder)))
    assert find_pretokenizer(tokenizer.backend_tokenizer) == pre
    rows = (shared_data / "math" / "gsm8k_test.jsonl").read_text(encoding="utf-8").splitlines()[:100]
    check(tokenizer, tmp_path, (*PROBES, *MORE, *(json.loads(row)["question"] for row in rows)))


def test_a_real_sentencepiece_model_tells_its_published_story(shared_data, tmp_path):
    folder = shared_data / "models" / "stories260K"
    path = tmp_path / "m.gguf"
    write_gguf(str(folder), How(output=path), kind="f32")
    pytest.importorskip("xllamacpp")
    texts = ["Once upon a time", "  two spaces", "\u00e9 unknown \u6771", "line\nbreak"]
    said = run_llama_cpp(
        {
            "path": str(path), "context": 256, "threads": 1, "sequences": [[[1], []]], "top": 1, "max_tokens": 200,
            "stop_ids": [2], "texts": texts, "add_special": False, "conversations": [],
        }
    )  # fmt: skip
    story = (shared_data / "models" / "stories260K_expected_greedy_200.txt").read_text(encoding="utf-8")
    assert said["greedy"][0]["text"].strip()[:400] == story.strip()[:400]
    tokenizer = load_tokenizer(ModelSettings(name_or_path=str(folder)))
    assert said["tokens"] == [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert torch.tensor(said["greedy"][0]["ids"]).shape == (200,)


def test_a_real_model_without_a_template_whose_texts_begin_with_bos_passes_the_gate(
    shared_data, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("xllamacpp")
    from gguf import GGUFReader

    monkeypatch.chdir(tmp_path)
    model = str(shared_data / "models" / "stories260K")
    assert main(["export", "gguf", model, "--type", "q8_0"]) == 0
    assert capsys.readouterr().err == ""
    chatty = shutil.copytree(model, tmp_path / "chatty")
    (chatty / "chat_template.jinja").write_text(ALPACA)  # with a BOS that the tokenizer adds too
    assert main(["export", "gguf", str(chatty), "--type", "q8_0"]) == 0
    file = tmp_path / "stories260K-GGUF" / "stories260K-Q8_0.gguf"
    reader = GGUFReader(file, "r+")
    field = reader.fields["tokenizer.ggml.add_bos_token"]
    field.parts[field.data[0]][0] = False
    reader.data.flush()
    assert main(["export", "verify", model, str(file)]) == 3
    said = capsys.readouterr()
    assert "tokenizer.ggml.add_bos_token is False, not True" in said.out
    assert "6 of 6 prompts become other token ids in llama.cpp" in said.out
