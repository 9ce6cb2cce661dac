"""One spelling for each answer: LaTeX decoration, Unicode digits, units, percent, thousands separators, lists.

raw answer --normalise--> plain LaTeX --as_quantity--> (Fraction, unit)
                                      --as_list-->     brackets and parts
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

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
    """The answer in one plain LaTeX spelling; what it means is unchanged."""
    text = _plain_characters(text)
    for pattern, replacement in REPLACEMENTS[:3]:
        text = pattern.sub(replacement, text)
    text = _unwrap(COSMETIC.sub(" ", text).strip())
    while FONT.search(text):
        text = FONT.sub(r" \1 ", text)
    for pattern, replacement in REPLACEMENTS[3:]:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".,;:").strip()


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
    return re.sub(r"(?<=\d)\}\^\{(?=\d)", "", "".join(out))


def _unwrap(text: str) -> str:
    """Take off what encloses the whole answer: dollar signs, brackets of display mode, emphasis, \\boxed."""
    while True:
        before = text
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


# Numbers and units -----------------------------------------------------------------------------------------------

PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?: \d{3})+|\d+)(?:\.\d*)?|\.\d+"
NUMBER = re.compile(
    rf"""(?P<sign>[+-]?)\s*(?P<currency>[$\u20ac\u00a3\u00a5\u20b9]?)\s*(?:
        (?P<whole>\d+)\s*(?:\\frac\{{(?P<top1>\d+)\}}\{{(?P<bottom1>\d+)\}}|\ (?P<top2>\d+)\s*/\s*(?P<bottom2>\d+))
      | \\frac\{{\s*(?P<top3>-?\d+(?:\.\d+)?)\s*\}}\{{\s*(?P<bottom3>-?\d+(?:\.\d+)?)\s*\}}
      | (?P<plain>{PLAIN})
        (?:\s*/\s*(?P<bottom4>\d+(?:\.\d+)?) | (?:[eE]|\s*\\cdot\s*10\s*\^)\s*\{{?(?P<power>[+-]?\d{{1,3}})\}}?)?
    )""",
    re.VERBOSE,
)
ONE_LETTER_UNITS = frozenset("mgshlLJNWVAKCF")
TWO_LETTER_UNITS = frozenset(
    ["cm", "mm", "km", "kg", "mg", "ml", "mL", "ft", "in", "lb", "oz", "hr", "mi", "yd", "am", "pm", "kW", "GB", "MB"]
    + ["TB", "Hz", "st", "nd", "rd", "th"]
)
NO_UNIT = frozenset(
    ["or", "and", "not", "nor", "to", "minus", "plus", "times", "over", "hundred", "thousand", "million", "billion"]
    + ["trillion", "dozen", "half", "sin", "cos", "tan", "log", "ln", "exp", "mod", "gcd", "lcm", "max", "min", "lim"]
)
MYRIADS = frozenset("\u767e\u5343\u4e07\u842c\u4ebf\u5104\u5146\u534a")
"""Chinese and Japanese numerals, from hundred to trillion, and half: they change the number before them."""
UNIT_NAMES = {
    "centimeter": "cm", "centimetre": "cm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "millimeter": "mm", "millimetre": "mm", "gram": "g", "kilogram": "kg", "liter": "l", "litre": "l", "hour": "h",
    "hr": "h", "second": "s", "sec": "s", "feet": "ft", "foot": "ft", "inch": "in", "inche": "in", "pound": "lb",
    "mile": "mi", "yard": "yd", "ounce": "oz", "percent": "%", "people": "person",
    "$": "dollar", "\u20ac": "euro", "\u00a3": "pound", "\u00a5": "yen", "\u5186": "yen", "\u5143": "yuan",
}  # fmt: skip


class Quantity(NamedTuple):
    """An exact number and its unit, "" where none was written."""

    value: Fraction
    unit: str


def as_quantity(text: str) -> Quantity | None:
    """The number `text` is, if it is nothing but one number with or without a unit.

    Example: "$1,234.50" -> (2469/2, "dollar"), r"3\\frac{1}{2} \\text{ cm}" normalised -> (7/2, "cm"), "5x" -> None.
    """
    match = NUMBER.match(text)
    if match is None:
        return None
    value = _value(match)
    rest = text[match.end() :]
    unit = _unit(rest, apart=rest.startswith(" "))
    if value is None or unit is None:
        return None
    return Quantity(value, unit or UNIT_NAMES.get(match["currency"], match["currency"]))


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    top = part["top1"] or part["top2"] or part["top3"]
    bottom = Fraction(part["bottom1"] or part["bottom2"] or part["bottom3"] or part["bottom4"] or 1)
    if bottom == 0:
        return None
    if top:
        value = Fraction(part["whole"] or 0) + Fraction(top) / bottom
    else:
        digits = part["plain"].replace(",", "").replace(" ", "").removesuffix(".")
        value = Fraction(digits) / bottom * Fraction(10) ** int(part["power"] or 0)
    return -value if part["sign"] == "-" else value


def _unit(rest: str, *, apart: bool) -> str | None:
    """The unit that `rest` is, "" for none, None if `rest` is something else, such as a variable."""
    rest = rest.strip()
    if rest in ("", "%"):
        return rest
    match = re.fullmatch(r"([^\W\d_](?:[^\W\d_]|[ .'/-])*)\s*(\^\{[23]\})?", rest)
    if match is None or MYRIADS.intersection(rest):
        return None
    words = re.findall(r"[^\W\d_]+", match[1])
    if NO_UNIT.intersection(word.lower() for word in words) or _is_variable(match[1], apart=apart):
        return None
    return " ".join(UNIT_NAMES.get(_singular(w), _singular(w)) for w in words) + (match[2] or "")


def _is_variable(letters: str, *, apart: bool) -> bool:
    """Whether one or two letters after a number are factors, as in 5x, rather than a unit, as in 5 m."""
    if not letters.isascii() or len(letters) > 2:
        return False
    return not (apart and letters in ONE_LETTER_UNITS) and letters not in TWO_LETTER_UNITS


def _singular(word: str) -> str:
    word = word.lower()
    return word[:-1] if len(word) > 2 and word.endswith("s") else word


def same_quantity(answer: Quantity, gold: Quantity) -> bool:
    """Equal numbers; units must agree only where both are written, and 50% is 50 as well as 0.5."""
    if "%" in (answer.unit, gold.unit) and answer.unit != gold.unit:
        if answer.unit and gold.unit:
            return False
        share = answer if answer.unit else gold
        other = gold if answer.unit else answer
        return other.value in (share.value, share.value / 100)
    units_agree = not answer.unit or not gold.unit or answer.unit == gold.unit
    return units_agree and answer.value == gold.value


# Structure -------------------------------------------------------------------------------------------------------

ASSIGNED = re.compile(
    r"(?:[A-Za-z](?:_\{?\w+\}?)?(?:\([A-Za-z](?:, ?[A-Za-z])*\))?|\([A-Za-z](?:, ?[A-Za-z])+\))\s*(?:=|\\in )\s*"
)
RELATION = re.compile(r"=|<|>|\\(?:le|ge|ne|lt|gt|approx|equiv|sim|in)(?![A-Za-z])")


def is_relation(text: str) -> bool:
    """Whether `text` says something about two sides, such as 6=5 or x<3, rather than naming a value."""
    return RELATION.search(text) is not None


def without_spaces(text: str) -> str:
    """The text without spaces, but for those between two digits."""
    return re.sub(r"(?<!\d) | (?!\d)", "", text)


def is_words(text: str) -> bool:
    """Whether `text` is a word or several rather than symbols: Tuesday, no solution; but not xy."""
    letters = text.replace(" ", "").replace("-", "").replace("'", "").replace(".", "")
    return letters.isalpha() and len(letters) >= (3 if letters.isascii() else 1)


def assigned_name(text: str) -> str:
    """What `assigned_value` takes off: "x" in "x = 5", "" where nothing is assigned."""
    value = assigned_value(text)
    return text[: len(text) - len(value)].rstrip("= ").removesuffix("\\in")


def assigned_value(text: str) -> str:
    """What a name is set to: "x = 5" -> "5", "f(x) = 2x" -> "2x"; any other text as it is."""
    match = ASSIGNED.match(text)
    if match is None or is_relation(text[match.end() :]):
        return text
    return text[match.end() :]


class Parts(NamedTuple):
    """A list's brackets and its parts; one part without brackets is no list."""

    opening: str
    closing: str
    parts: list[str]

    @property
    def is_ordered(self) -> bool:
        return self.opening in ("(", "[")


def as_list(text: str) -> Parts:
    r"""Cut at the commas, `and`, `or` and \cup that lie outside all brackets.

    Example: "(1, 2)" -> "(" ")" ["1", "2"]; r"\{1,2\}" -> r"\{" r"\}" ["1", "2"]; "x=1 or x=2" -> "" "" ["x=1", "x=2"].
    """
    for left, right in ((r"\{", r"\}"), ("(", ")"), ("[", "]"), ("(", "]"), ("[", ")")):
        if text.startswith(left) and text.endswith(right) and len(text) > len(left):
            inner = text[len(left) : -len(right)]
            parts = _cut(inner, thousands=False)
            if parts is not None:
                return Parts(left, right, parts)
    parts = _cut(text, thousands=True)
    if parts is not None and len(parts) == 1 and text.count(r"\pm") == 1:
        parts = [text.replace(r"\pm", "").strip(), text.replace(r"\pm", "-").strip()]
    return Parts("", "", [text] if parts is None else parts)


SEPARATOR = re.compile(r"\\[{}]|[()\[\]{}]|,|;| and | or |\\cup(?![A-Za-z])|\\.")
THOUSANDS = re.compile(r",\d{3}(?!\d)")


def _cut(text: str, *, thousands: bool) -> list[str] | None:
    """The parts between top-level separators; None where brackets close that were never opened."""
    parts, start, depth = [], 0, 0
    for match in SEPARATOR.finditer(text):
        token = match[0]
        if token in ("(", "[", "{", r"\{"):
            depth += 1
        elif token in (")", "]", "}", r"\}"):
            depth -= 1
            if depth < 0:
                return None
        elif depth == 0 and (token in (",", ";", " and ", " or ") or token == r"\cup"):
            at = match.start()
            if thousands and at and text[at - 1].isdigit() and THOUSANDS.match(text, at):
                continue
            parts.append(text[start:at].strip())
            start = match.end()
    return [part for part in (*parts, text[start:].strip()) if part]
