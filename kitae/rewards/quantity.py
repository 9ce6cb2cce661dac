"""Numbers with units: from normalised text to an exact fraction, and when two of them are the same."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

PLAIN = r"(?:\d{1,3}(?:,\d{3})+|\d{1,3}(?:[ ]\d{3})+|\d+)(?:\.\d*)?|\.\d+"
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
    "cm mm km kg mg ml mL ft in lb oz hr mi yd am pm kW GB MB TB Hz st nd rd th".split()  # noqa: SIM905
)
NO_UNIT = frozenset(
    "or and not nor to minus plus times over hundred thousand million billion trillion dozen half "  # noqa: SIM905
    "sin cos tan log ln exp mod gcd lcm max min lim".split()
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
