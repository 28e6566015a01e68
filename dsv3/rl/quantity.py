r"""Reads numbers as people write answers: `1,234.50`, `\$18`, `-\frac{3}{4}`, `1\frac12`, `50\%`, `12 km/h`.

Exactly, as fractions. What is not plainly one number, with or without a unit, is none: `2k`, `52_8`, `(1,2)`, `\sqrt2`.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

MAX_CHARACTERS, MAX_EXPONENT = 200, 100

_SPACES = re.compile(r"(?:\\[!,;: ]|\\q?quad\b|~|\s)+")
_GROUPS = re.compile(r",\s*\\!\s*")
_WRAPPED = re.compile(r"^(?:\\\(|\\\[|\$+)(.*?)(?:\\\)|\\\]|\$+)$")
_MONEY = re.compile(r"^([-−+]?)(?:\\?[$]|[€£¥₹]|\\pounds|\\euro)")
_VALUE = re.compile(
    r"""^(?P<sign>[-−+]?)\s*(?:
        (?:(?P<mixed>\d+)\s*\+?\s*)?\\[dt]?frac\s*(?:\{\s*(?P<top>-?\d+)\s*\}|(?P<top1>\d))\s*
            (?:\{\s*(?P<bottom>\d+)\s*\}|(?P<bottom1>\d))
      | (?:(?P<mixed2>\d+)\s+)?(?P<over>\d+)\s*/\s*(?P<under>\d+)
      | (?P<digits>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.?\d*|\.\d+)
            (?:\s*(?:\\times|\\cdot|[×*])\s*10\s*\^\s*(?:\{\s*(?P<power>[-+]?\d+)\s*\}|(?P<power1>\d))
              |[eE](?P<power2>[-+]?\d+))?
    )""",
    re.VERBOSE,
)
_PERCENT = re.compile(r"^\s*(?:\\?%|per\s?cent\b|\\text\{\s*(?:\\?%|per\s?cent)\s*\})")
_POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d)|[²³])?"
_LATEX_UNIT = re.compile(rf"^\s*\\(?:text|mbox|textrm|mathrm|textbf|operatorname)\s*\{{([^{{}}]*)\}}({_POWER})\s*$")
_DEGREES = re.compile(r"^\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degree)\s*[CF]?$")
_SHORT = "mm cm dm km mg kg ml dl ms min hr hrs sec ft in yd mi lb lbs oz mph kph km/h m/s ft/s am pm".split()
_LETTERS = ("m", "g", "t", "l", "h", "s")  # units only behind a blank: `5t` is a product
_WORDS = re.compile(rf"^\s+([^\W\d_]+(?:[-/.' ]+[^\W\d_]+)*)({_POWER})$")
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_NO_UNITS = frozenset("or and to not than half quarter third plus minus times over squared cubed".split())


class Quantity(NamedTuple):
    """A number as it was written.

    Args:
      value: the number; of `50%` it is 50.
      percent: whether a percent sign follows.
      unit: what else stood with it, in small letters; "" where nothing did.
    """

    value: Fraction
    percent: bool
    unit: str


def read_quantity(text: str) -> Quantity | None:
    r"""Reads a number with its unit; returns None where the text is not just that.

    >>> read_quantity(r"\$1,234.50")
    Quantity(value=Fraction(2469, 2), percent=False, unit='$')
    >>> read_quantity(r"-\frac{3}{4}\text{ cm}^2")
    Quantity(value=Fraction(-3, 4), percent=False, unit='cm^2')
    >>> read_quantity("2k"), read_quantity("1/0"), read_quantity("50 percent").percent
    (None, None, True)
    """
    if len(text) > MAX_CHARACTERS:
        return None
    text = _SPACES.sub(" ", _GROUPS.sub(",", text)).strip().rstrip(".").strip()
    if wrapped := _WRAPPED.match(text):
        text = wrapped[1].strip()
    money = _MONEY.match(text)
    if money:
        text = money[1] + text[money.end() :].lstrip()
    match = _VALUE.match(text)
    value = _value(match) if match else None
    if value is None:
        return None
    rest = text[match.end() :].removesuffix("$")
    if percent := _PERCENT.match(rest):
        rest = rest[percent.end() :]
    found = _unit(rest)
    if found is None:
        return None
    scale, unit = found
    return Quantity(value * scale, percent is not None, "$" if money and not unit else unit)


def _value(match: re.Match) -> Fraction | None:
    """The number of a match of `_VALUE`; None where it divides by 0 or is out of reach."""
    got = match.groupdict()
    whole = Fraction(got["mixed"] or got["mixed2"] or 0)
    if got["digits"]:
        power = int(got["power"] or got["power1"] or got["power2"] or 0)
        if abs(power) > MAX_EXPONENT:
            return None
        value = Fraction(got["digits"].replace(",", "").rstrip(".") or "0") * Fraction(10) ** power
    else:
        top, bottom = got["top"] or got["top1"] or got["over"], got["bottom"] or got["bottom1"] or got["under"]
        if int(bottom) == 0 or (whole and int(top) < 0):
            return None
        value = whole + Fraction(int(top), int(bottom))
    return -value if got["sign"] in ("-", "−") else value


def _unit(rest: str) -> tuple[int, str] | None:
    """What follows a number: a scale, as of `million`, and a unit, "" for nothing; None where it is something else."""
    if not rest.strip():
        return 1, ""
    if _DEGREES.match(rest):
        return 1, "degree"
    if match := _LATEX_UNIT.match(rest):
        inner, power = match[1], match[2]
    else:
        match = _WORDS.match(rest) or re.match(rf"^({'|'.join(_SHORT)})({_POWER})$", rest)
        if match is None:
            return None
        inner, power = match[1], match[2]
        words = inner.split()
        if len(words) == 1 and len(words[0]) < 3 and words[0].lower() not in (*_SHORT, *_LETTERS):
            return None
    words = inner.lower().split()
    if _NO_UNITS & set(words):
        return None
    scale = _SCALES.get(words[0].removesuffix("s"), 1) if words else 1
    return scale, _unit_name(" ".join(words[scale > 1 :]) + power)


def _unit_name(text: str) -> str:
    """A unit in one form: small letters, no braces, singular."""
    plain = re.sub(r"[{} ]", "", text.lower().replace("²", "^2").replace("³", "^3")).strip(".")
    return {"dollar": "$", "°": "degree"}.get(plain.removesuffix("s"), plain.removesuffix("s"))
