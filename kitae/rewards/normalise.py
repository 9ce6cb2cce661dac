"""One spelling for each answer: LaTeX decoration, Unicode digits, units, percent, thousands separators, lists.

raw answer --normalise--> plain LaTeX --as_quantity--> (Fraction, unit)
                                      --as_list-->     brackets and parts
"""

from __future__ import annotations

import re
import unicodedata

SYMBOLS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00d7\u00b7\u22c5\u2217", "\\cdot "),
        "\u00f7": "/",
        "\u2215": "/",
        "\u221a": "\\sqrt ",
        "\u03c0": "\\pi ",
        "\u221e": "\\infty ",
        "\u00b1": "\\pm ",
        "\u2264": "\\le ",
        "\u2265": "\\ge ",
        "\u2260": "\\ne ",
        "\u222a": "\\cup ",
        "\u2208": "\\in ",
        "\u00b0": " degrees ",
        "\u3002": ".",
        "\u3001": ",",
    }
)
SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207b", "0123456789-"
)
WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("`", "`"))
COSMETIC = re.compile(
    r"~|(?<!\\)\\(?:[!,;:> ]|(?:left|right|displaystyle|limits|bigl|bigr|big|Big|quad|qquad)(?![A-Za-z]))"
)
FONT = re.compile(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf|mathit|operatorname|rm)\s*\{([^{}]*)\}")
END_MARKS = ".,;: "
REPLACEMENTS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\([$%#&])"), r"\1"),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])"), r"\\ge"),
    (re.compile(r"\\neq(?![A-Za-z])"), r"\\ne"),
    (re.compile(r"\\times(?![A-Za-z])"), r"\\cdot"),
    (re.compile(r"\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])"), " degrees "),
    (re.compile(r"\^\s*\{\s*(?:st|nd|rd|th)\s*\}"), ""),
    (re.compile(r"\*\*"), "^"),
    (re.compile(r"\*"), r"\\cdot "),
    (re.compile(r"(?<![A-Za-z\\])(sqrt|pi|infty)(?![A-Za-z])"), r"\\\1"),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\sqrt\s*(\d+|[A-Za-z])"), r"\\sqrt{\1}"),
    (re.compile(r"\\frac\s*([0-9])\s*([0-9])(?![0-9])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([0-9A-Za-z])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])"), r"\1{\2}"),
    (re.compile(r"\^\s*(-?\d+)"), r"^{\1}"),
    (re.compile(r"\s+"), " "),
)


def normalise(text: str) -> str:
    r"""The answer in plain LaTeX. Example: "$\boxed{\dfrac12}$." -> r"\frac{1}{2}"; "\uff15\u00b2" -> "5^{2}"."""
    text = _plain_characters(text)
    for pattern, replacement in REPLACEMENTS[:3]:
        text = pattern.sub(replacement, text)
    text = _unwrap(COSMETIC.sub(" ", text).strip())
    while FONT.search(text):
        text = FONT.sub(r" \1 ", text)
    for pattern, replacement in REPLACEMENTS[3:]:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(END_MARKS)


def _plain_characters(text: str) -> str:
    """ASCII for what ASCII can say: digits of all scripts, minus signs, full-width forms, superscripts."""
    out = []
    for char in text.translate(SYMBOLS):
        raised = char.translate(SUPERSCRIPTS)
        if raised != char:
            out.append("^{" + raised + "}")
        elif char.isascii():
            out.append(char)
        elif unicodedata.category(char) == "Cf":
            continue  # marks of direction and width are invisible
        elif unicodedata.category(char) == "Nd":
            out.append(str(unicodedata.decimal(char)))
        elif unicodedata.category(char) == "No" and "\u2044" in unicodedata.normalize("NFKC", char):
            out.append(" " + unicodedata.normalize("NFKC", char).replace("\u2044", "/"))
        else:
            out.append(unicodedata.normalize("NFKC", char).replace("\u2044", "/"))
    return re.sub(r"(?<=[\d-])\}\^\{(?=\d)", "", "".join(out))


def _unwrap(text: str) -> str:
    """Take off what encloses the whole answer: dollar signs, brackets of display mode, emphasis, \\boxed."""
    while True:
        before = text
        text = text.rstrip(END_MARKS)
        for left, right in WRAPPERS:
            inner = text[len(left) : -len(right)]
            if len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right):
                text = inner.strip() if left not in inner and right not in inner else text
        boxed = re.match(r"\\(?:boxed|fbox)\s*\{", text)
        if boxed and closing_brace(text, boxed.end() - 1) == len(text) - 1:
            text = text[boxed.end() : -1].strip()
        if text == before:
            return text


def closing_brace(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes, or -1."""
    depth = 0
    for match in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        if match[0] == "{":
            depth += 1
        elif match[0] == "}":
            depth -= 1
            if depth == 0:
                return match.start()
    return -1
