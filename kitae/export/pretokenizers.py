"""Which of llama.cpp's pre-tokenizers splits text as a tokenizer does: found by running both on probing strings.

llama.cpp knows how a tokenizer cuts text before merging only by a name. Here the name is that of the regular expressions
which give the same pieces, whoever made the tokenizer; where none does, the first difference is told.
"""

from __future__ import annotations

import json
from typing import Any

from kitae.errors import ModelError

_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = f"{_ENDINGS}|[^\\r\\n\\p{{L}}\\p{{N}}]?\\p{{L}}+|"
_REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
_GPT2 = "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)"
_CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u0391-\u03a1\u03a3-\u03f5\u0400-\u0481\u048a-\u052f"
)
EXPRESSIONS = {
    "qwen2": [f"{_WORDS}\\p{{N}}{_REST}"],
    "llama-bpe": [f"{_WORDS}\\p{{N}}{{1,3}}{_REST}"],
    "qwen35": [
        f"{_ENDINGS}|[^\\r\\n\\p{{L}}\\p{{N}}]?[\\p{{L}}\\p{{M}}]+|\\p{{N}}"
        "| ?[^\\s\\p{L}\\p{M}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
    ],
    "gpt-2": [_GPT2],
    "smollm": ["\\p{N}", _GPT2],
    "deepseek-v3": [
        "\\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    ],
    "deepseek-llm": [
        "[\\r\\n]",
        f"\\s?[{_CASED}]+",
        "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
        "\\s+$",
        "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
        "\\p{N}+",
    ],
}
"""llama.cpp's names, with the expressions each applies in turn to what the one before has cut."""
PROBES = (
    "Hello world",
    " leading and  double   spaces ",
    "don't DON'T we'll THEY'RE i'm it's x'd",
    "1 22 333 4444 1234567",
    "a1b22c333",
    "3.14159 + 2,000,000 = ?",
    "line\nbreaks\n\nand\r\nmore\n \n  indented\n\ttabs\t\tend\t",
    "trailing   ",
    "f(x) = x**2; // note\n\nif (a != b) {\n    return a[0]->c;\n}\n",
    "path/to/file_name.py --flag=value",
    "caf\xe9 na\xefve e\u0301te\u0301 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\u4f60\u597d\u4e16\u754c abc \u4e2d\u65871\u6587",
    "\u3053\u3093\u306b\u3061\u306f \u30ab\u30bf\u30ab\u30ca",
    "\uc548\ub155 \uc138\uacc4",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u03b1\u03b2\u03b3",
    "\U0001f600 \U0001f468\u200d\U0001f469 ok",
    "camelCaseWord HTTPServer ABCdef",
    "\xbd \u2460 \u0663\u0664 x\xb2",
    "...!!!???\n\n###",
    "$5 <tag> @user #1 _under_ a_b",
    "\u3002\uff0c\uff01\u3001 end.\u201cquoted\u201d",
    "/\n\n//\n a/b/\n",
)
"""Strings that the expressions cut differently."""


def find_pretokenizer(tokenizer: Any) -> str:
    """llama.cpp's name for how a tokenizers.Tokenizer (untyped) of byte-level BPE cuts text."""
    differences = {}
    for name in EXPRESSIONS:
        differences[name] = unlike_probes(tokenizer, name)
        if not differences[name]:
            return name
    nearest = min(differences, key=lambda name: len(differences[name]))
    unlike = differences[nearest]
    raise ModelError(
        f"no pre-tokenizer of llama.cpp that kitae knows cuts text as this tokenizer does; the nearest, {nearest}, cuts "
        f"{len(unlike)} of {len(PROBES)} probes otherwise, such as {json.dumps(unlike[0])}; name one with --pre_tokenizer"
    )


def unlike_probes(tokenizer: Any, name: str) -> list[str]:
    """The probes that llama.cpp's pre-tokenizer of a name in EXPRESSIONS cuts otherwise than a tokenizers.Tokenizer."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split

    splits = [Split(Regex(expression), "isolated") for expression in EXPRESSIONS[name]]
    theirs = Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)])
    return [text for text in PROBES if _pieces(theirs, text) != _pieces(tokenizer.pre_tokenizer, text)]


def _pieces(pretokenizer: Any, text: str) -> list[str]:
    return [piece for piece, _ in pretokenizer.pre_tokenize_str(text)]
