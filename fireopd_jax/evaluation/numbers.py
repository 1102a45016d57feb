r"""Numbers as people write them, read exactly.

    `$1{,}450.00`, `3\frac{1}{2}`, `25\%`, `5.0 \times 10^3`, `18 dollars` -> Number

The text is in normal spelling. What is no number gives None.
"""

import dataclasses
import re
from fractions import Fraction

from fireopd_jax.evaluation.spelling import ungrouped

MAX_DIGITS = 1000
"""Longer numbers and exponents are compared as text: their arithmetic would take memory."""

SIGN = r"[-+]?\s*"
DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
LEAF = re.compile(rf"({SIGN})({DECIMAL})")
SCIENTIFIC = re.compile(
    rf"({SIGN})({DECIMAL})(?:[eE]|\s*(?:\\times|\\cdot|\*|x|X)\s*10\s*\^\s*)"
    r"(?:\{\s*([-+]?\s*\d+)\s*\}|([-+]?\d+))"
)
RATIO = re.compile(
    rf"({SIGN})(?:\\frac\{{\s*({SIGN}{DECIMAL})\s*\}}\{{\s*({SIGN}{DECIMAL})\s*\}}"
    rf"|\(?({DECIMAL})\s*/\s*({DECIMAL})\)?)"
)
MIXED = re.compile(
    rf"({SIGN})(\d+)(?:\s*\\frac\{{(\d+)\}}\{{(\d+)\}}|\s+(?:and\s+)?(\d+)\s*/\s*(\d+))"
)
REPEATING = re.compile(rf"({SIGN})(\d*)\.(\d*)\\(?:overline|bar|dot)\{{?(\d+)\}}?")
UNSIGNED = "|".join(
    form.pattern.replace(rf"({SIGN})", "", 1) for form in (SCIENTIFIC, MIXED, RATIO, REPEATING)
)
"""Numbers but plain ones, without their sign."""

ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
WORDS = {
    **{word: n for n, word in enumerate(ONES)},
    **{word: 10 * n for n, word in enumerate(TENS, start=2)},
    **{f"{ten}-{one}": 10 * n + m for n, ten in enumerate(TENS, start=2)
       for m, one in enumerate(ONES[1:10], start=1)},
}  # fmt: skip
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12}  # fmt: skip

DIMENSIONS = {
    "length": {
        "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100",
        "m meter metre": "1", "km kilometer kilometre": "1000", "in inch inches": "127/5000",
        "ft foot feet": "381/1250", "yd yard": "1143/1250", "mi mile": "201168/125",
    },
    "mass": {"mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000",
             "lb lbs": "45359237/100000", "oz ounce": "45359237/1600000"},
    "time": {"s sec second": "1", "min minute": "60", "h hr hrs hour": "3600", "day": "86400",
             "week": "604800"},
    "volume": {"ml milliliter millilitre": "1/1000", "l liter litre": "1"},
    "dollars": {"$ dollar usd buck": "1", "cent ¢": "1/100"},
    "euros": {"€ euro eur": "1"}, "pounds": {"£ gbp": "1"}, "yen": {"¥ yen jpy": "1"},
    "rupees": {"₹ rupee rs inr": "1"},
    "angle": {r"^\circ deg degree": "1"}, "radians": {"rad radian": "1"},
    "celsius": {r"^\circc celsius": "1"}, "fahrenheit": {r"^\circf fahrenheit": "1"},
}  # fmt: skip
UNITS = {
    name: (dimension, Fraction(size))
    for dimension, units in DIMENSIONS.items()
    for names, size in units.items()
    for name in names.split()
}
"""Unit -> dimension, size."""
PERCENT = re.compile(
    r"\s*(?:\\?%|\bper\s?cent(?:age)?\b|\bpct\b|\\text\{\s*(?:\\?%|per\s?cent)\s*\})\s*$"
)
CURRENCY = re.compile(
    r"^([-+]?)\s*(?:US|U\.S\.)?\s*(\\?\$|[€£¥₹]|\\pounds|\\euro|Rs\.?(?=\s|\d))\s*"
)
DEGREE = re.compile(r"\s*\^\s*\\circ\s*(?:\\text\{\s*)?([CF]?)\s*\}?$")
OPERATORS = (
    "and or to sin cos tan cot sec csc log ln exp sqrt pi mod gcd lcm max min det choose factorial "
    "squared cubed if for when where plus minus times divided"
)
NO_UNIT = {*OPERATORS.split(), *WORDS, *SCALES}
PREFIX = re.compile(
    "|".join([SCIENTIFIC.pattern, MIXED.pattern, RATIO.pattern, REPEATING.pattern])
    + rf"|{SIGN}(?:[1-9]\d{{0,2}}(?:,\d{{3}})+(?![\d,])(?:\.\d+)?|{DECIMAL})"
    + rf"|(?i:{'|'.join(sorted(WORDS, key=len, reverse=True))})(?![\w-])"
)
SCALE = re.compile(rf"\s*(?:\s|\\text\{{)\s*({'|'.join(SCALES)})(?![A-Za-z])\s*\}}?", re.I)
TOKEN = re.compile(
    r"\\text\{[^{}\d]*\}|\^\s*(?:\{\s*-?\d\s*\}|-?\d)|[A-Za-z¢][A-Za-z'’-]*\.?|\s+|[/,.]|\\cdot"
)


@dataclasses.dataclass(frozen=True)
class Number:
    """An exact rational number, with what is written around it."""

    size: Fraction
    places: int | None = None
    """Decimal places as written; None for an integer or a fraction."""
    percent: bool = False
    unit: tuple[str, Fraction] | None = None
    """Dimension and size of a known unit; None without one."""


def number(text: str) -> Number | None:
    """Return the number that a whole text stands for, with percent sign, currency or unit."""
    text = text.strip()
    if len(text) > MAX_DIGITS:
        return None
    unit = None
    if money := CURRENCY.match(text):
        sign, name = money[1], money[2].lstrip("\\").lower().rstrip(".")
        unit = UNITS.get({"pounds": "£", "euro": "€"}.get(name, name))
        text = sign + text[money.end() :]
    if (short := PERCENT.sub("", text)) != text:
        found = bare(short)
        return found and dataclasses.replace(found, percent=True)
    if degree := DEGREE.search(text):
        unit = UNITS[r"^\circ" + degree[1].lower()]
        text = text[: degree.start()]
    if found := bare(text):
        return dataclasses.replace(found, unit=unit)
    prefix = PREFIX.match(text)
    if prefix is None:
        return None
    scale = SCALE.match(text, prefix.end())
    rest = text[(scale or prefix).end() :]
    found = bare(prefix[0] + (f" {scale[1]}" if scale else ""))
    if found and is_unit(rest):
        return dataclasses.replace(found, unit=unit or known_unit(rest))
    return None


def bare(text: str) -> Number | None:
    """Return the number that a text stands for, without any unit."""
    text = ungrouped(text.strip())
    while (
        len(text) > 1 and text[0] + text[-1] in ("{}", "()") and not set(text[1:-1]) & set("(){}")
    ):
        text = text[1:-1].strip()
    if text.startswith(r"\text{") and text.endswith("}"):
        text = text[6:-1].strip()
    return literal(text) or worded(text)


def literal(text: str) -> Number | None:
    """Return the number that digits stand for."""
    if match := LEAF.fullmatch(text):
        return Number(_signed(match[1], Fraction(match[2])), _places(match[2]))
    if match := RATIO.fullmatch(text):
        above, below = (_fraction(match[i] or match[i + 2]) for i in (2, 3))
        return Number(_signed(match[1], above / below)) if below else None
    if match := MIXED.fullmatch(text):
        whole, above, below = int(match[2]), int(match[3] or match[5]), int(match[4] or match[6])
        return Number(_signed(match[1], whole + Fraction(above, below))) if below else None
    if match := SCIENTIFIC.fullmatch(text):
        power = int((match[3] or match[4]).replace(" ", ""))
        if abs(power) > MAX_DIGITS:
            return None
        return Number(_signed(match[1], Fraction(match[2]) * Fraction(10) ** power))
    if match := REPEATING.fullmatch(text):
        whole, fixed, again = match[2] or "0", match[3], match[4]
        tail = Fraction(int(again), (10 ** len(again) - 1) * 10 ** len(fixed))
        return Number(_signed(match[1], Fraction(f"{whole}.{fixed}0") + tail))
    return None


def worded(text: str) -> Number | None:
    """Return the number that words stand for: `seven`, `twenty-one`, `3.5 million`."""
    first, _, scale = text.lower().rpartition(" ")
    if scale in SCALES and first:
        found = literal(first) or worded(first)
        return found and Number(found.size * SCALES[scale])
    word = text.lower().replace(" ", "-")
    return Number(Fraction(WORDS[word])) if word in WORDS else None


def is_unit(rest: str) -> bool:
    r"""Return whether what follows a number is its unit: ` clips`, `\text{ cm}^2`; not ` xy`, `x`.

    Words may be any that are no functions, numbers or conjunctions; short ones must be known units.
    """
    end, named = 0, False
    for match in TOKEN.finditer(rest):
        if match.start() != end or (match[0][0] == "^" and not named):
            return False
        end, named = match.end(), match[0][0].isalpha() or match[0][:2] == r"\t"
        in_text = match[0].startswith(r"\text")
        for word in re.findall(r"[A-Za-z¢][A-Za-z'’-]*", match[0].removeprefix(r"\text")):
            attached = match.start() == 0 and not in_text
            if word.lower() in NO_UNIT or (
                attached and len(word) < 4 and (len(word) < 2 or not _known(word))
            ):
                return False
            if not in_text and len(word) < 3 and word != "of" and not _known(word):
                return False
    return end == len(rest)


def known_unit(text: str) -> tuple[str, Fraction] | None:
    """Return dimension and size of a text that is one known unit; None for any other."""
    unit, _, power = text.partition("^")
    words = re.sub(r"\\text\s*|[{}]", " ", unit).split()
    found = _known(words[0]) if len(words) == 1 else None
    power = power.strip(" {}")
    if found is None or not power:
        return found
    if not power.isdigit() or not 0 < int(power) < 10:
        return None
    return f"{found[0]}^{int(power)}", found[1] ** int(power)


def _known(word: str) -> tuple[str, Fraction] | None:
    word = word.lower().strip(".,")
    return UNITS.get(word) or UNITS.get(word.removesuffix("s"))


def _signed(sign: str, size: Fraction) -> Fraction:
    return -size if "-" in sign else size


def _fraction(text: str) -> Fraction:
    return Fraction(text.replace(" ", ""))


def _places(text: str) -> int | None:
    return len(text.partition(".")[2]) if "." in text else None


def written(number: Number) -> str:
    """Return a number in its shortest exact notation: `7`, `-0.5`, `1/3`, `25%`."""
    size, percent = number.size, "%" * number.percent
    rest = size.denominator
    for factor in (2, 5):
        while rest % factor == 0:
            rest //= factor
    places = size.denominator.bit_length()  # 10**places is a multiple of such a denominator.
    if rest > 1 or size.denominator == 1 or places > MAX_DIGITS:
        return f"{size}{percent}"
    digits = str(abs(size.numerator) * 10**places // size.denominator).rjust(places + 1, "0")
    sign = "-" * (size < 0)
    return f"{sign}{digits[:-places]}.{digits[-places:].rstrip('0')}{percent}"


SHORTEST_APPROXIMATION = 6
"""Significant digits from which on a decimal stands for the number that it rounds."""
FEWEST_PLACES = 4
"""Decimal places that such a decimal has at least."""


def equal_numbers(a: Number, b: Number) -> tuple[bool, str]:
    """Return whether two numbers are equal, and by which rule; the order does not matter."""
    if a.unit and b.unit and a.unit != b.unit:
        (of_a, size_a), (of_b, size_b) = a.unit, b.unit
        return of_a == of_b and a.size * size_a == b.size * size_b, "units"
    if a.percent != b.percent:
        percent, other = (a, b) if a.percent else (b, a)
        return other.size in (percent.size, percent.size / 100), "percent"
    if a.size == b.size:
        return True, "number"
    if _rounds(a, b.size) or _rounds(b, a.size):
        return True, "decimal"
    return False, "number"


def _rounds(short: Number, exact: Fraction) -> bool:
    """Return whether a decimal of enough digits is `exact`, rounded or cut at its last place."""
    if short.places is None or short.places < FEWEST_PLACES or not short.size:
        return False
    step = Fraction(1, 10**short.places)
    if abs(short.size / step) < 10 ** (SHORTEST_APPROXIMATION - 1):
        return False
    cut = abs(exact) // step * step
    return abs(short.size) in (cut, abs(round(exact / step) * step)) and short.size * exact > 0
