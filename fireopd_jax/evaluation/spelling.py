r"""Normal spelling of an answer: one notation for what LaTeX, Markdown and Unicode write in many.

    `\left(\dfrac43,\ 8{,}000\right]$.` -> `(\frac{4}{3}, 8000]`

Only the notation changes, never the value. The functions accept any text and never raise.
"""

import re

WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Fullwidth forms of ASCII."""
MINUS = "\u2212\u2010\u2011\u2012\u2013\u2014\ufe63\u2796"
SPACES = "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u3000"
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff\u200e\u200f"
FRACTIONS = {
    **{"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅖": "2/5"},
    **{"⅗": "3/5", "⅘": "4/5", "⅙": "1/6", "⅚": "5/6", "⅛": "1/8", "⅜": "3/8", "⅝": "5/8"},
    "⅞": "7/8",
}
SIGNS = {
    **dict.fromkeys(MINUS, "-"),
    **dict.fromkeys(SPACES, " "),
    **dict.fromkeys(INVISIBLE, ""),
    **{sign: f" {fraction}" for sign, fraction in FRACTIONS.items()},
    **{sign: f"^{{{n}}}" for n, sign in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")},
    **{sign: f"_{{{n}}}" for n, sign in enumerate("₀₁₂₃₄₅₆₇₈₉")},
    **{"‘": "'", "’": "'", "′": "'", "“": '"', "”": '"', "、": ",", "،": ",", "。": "."},
    **{"×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∗": "*", "÷": "/", "⁄": "/", "∕": "/"},
    **{"∶": ":", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "≈": r"\approx ", "±": r"\pm "},
    **{"∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∞": r"\infty ", "√": r"\sqrt"},
    **{"°": r"^\circ ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}", "π": r"\pi ", "θ": r"\theta "},
    **{"α": r"\alpha ", "β": r"\beta ", "⟨": "(", "⟩": ")", "【": "[", "】": "]"},
}
"""What Unicode writes in one character."""
CHARACTERS = {**WIDE, **{ord(sign): to for sign, to in SIGNS.items()}}

TEXT = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mathit|mathsf|mathtt|mbox|hbox|operatorname\*?)"
)
LATEX = [
    (r"\\(?:displaystyle|textstyle|limits|nolimits|hfill|,?\\?newline)(?![A-Za-z])", ""),
    (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
    (r"\\(?:lbrace|lbrac)(?![A-Za-z])", r"\\{"),
    (r"\\(?:rbrace|rbrac)(?![A-Za-z])", r"\\}"),
    (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
    (r"\\(?:leq|leqslant)(?![A-Za-z])", r"\\le"),
    (r"\\(?:geq|geqslant)(?![A-Za-z])", r"\\ge"),
    (r"\\lt(?![A-Za-z])", "<"),
    (r"\\gt(?![A-Za-z])", ">"),
    (r"\\(?:langle|lparen)(?![A-Za-z])\s*", "("),
    (r"\s*\\(?:rangle|rparen)(?![A-Za-z])", ")"),
    (r"\\(?:degree|textdegree)(?![A-Za-z])|\{\s*\\circ\s*\}", r"\\circ"),
    (r"(?<=\d)\s*\\circ", r"^\\circ"),
    (r"\\(?:mathbf|boldsymbol|bm|vec|bold)\s*\{([^{}]*)\}", r"\1"),
    (rf"{TEXT}\s*\{{", r"\\text{"),
    (r"\{\\(?:rm|bf|it)\s+([^{}]*)\}", r"\\text{\1}"),
    (r"\\(?:rm|bf|it)(?![A-Za-z])\s*|\\(?:text)?color\s*\{[^{}]*\}", ""),
    # Spaces; those between the digits of one number are nothing.
    (r"(?<=\d)\s*(?:\\[,!;: ]|~|\\thinspace)+\s*(?=\d{3}(?!\d))", ""),
    (r"(?<=\d)\s*(?:\\!|\{,\}\\!|,\\!|\\!,)+\s*(?=\d{3}(?!\d))", ","),
    (r"\\!", ""),
    (r"(?<!\\)\\(?:[,;: >]|q?quad(?![A-Za-z])|thinspace(?![A-Za-z])|medspace(?![A-Za-z]))|~", " "),
    # A comma in braces groups thousands, else it is a decimal comma.
    (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))", ","),
    (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d)", "."),
    (r"(?<=\d)\s*\{\s*\.\s*\}\s*(?=\d)", "."),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*\{([^{}]*)\}\s*(\w)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\w)\s*\{", r"\\frac{\1}{"),
    (r"\\frac\s*(\w)\s*(\w)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*\{\s*([^{}]*?)\s*\}\s*\{\s*([^{}]*?)\s*\}", r"\\frac{\1}{\2}"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
    (r"(?<![\\A-Za-z])(pi|infinity|sin|cos|tan|log|ln)(?![A-Za-z])", r"\\\1 "),
    (r"\\infinity(?![A-Za-z])", r"\\infty"),
    (r"\*\*", "^"),
    (r"\^\s*\(([^()]*)\)", r"^{\1}"),
    (r"\^\s*\{\s*([^{}]*?)\s*\}", r"^{\1}"),
]  # fmt: skip
REWRITES = [(re.compile(pattern), to) for pattern, to in LATEX]

BOLD = re.compile(r"(?<![\w)}*])(\*\*|__)(?=\S)([^*\n]+?)(?<=\S)\1(?![\w*])")
GROUPED = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")
SPACED = re.compile(r"(?<![\d.,/])[1-9]\d{0,2}(?: \d{3})+(?![\d/,])")
DELIMITERS = [(r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("`", "`"), ('"', '"')]
MAX_LENGTH = 4000
"""Longer texts are no answers."""
OUTER = " \t\r\n*_`#"


def without_bold(text: str) -> str:
    """Return a text without Markdown's bold marks; a power `x**2` stays."""
    return BOLD.sub(r"\2", text)


def spelled(text: str) -> str:
    """Return an answer in normal spelling, but for its thousands commas; a long text as it is."""
    if len(text) > MAX_LENGTH:
        return text
    text = undelimited(without_bold(text.translate(CHARACTERS)))
    for pattern, to in REWRITES:
        text = pattern.sub(to, text)
    text = SPACED.sub(lambda match: match[0].replace(" ", ""), text)
    return undelimited(re.sub(r"\s+", " ", text))


def undelimited(text: str) -> str:
    r"""Return a text without what surrounds it: `$...$`, `\(...\)`, bold, a final period, `\\`."""
    while True:
        before = text
        text = text.strip(OUTER)
        text = re.sub(r"(?:\\\\|(?<!\\)\\)$", "", text)
        text = re.sub(r"(?<=[^\s.])[.,;:]+$", "", text).strip(OUTER)
        for left, right in DELIMITERS:
            inner = text[len(left) : -len(right)]
            around = len(text) > len(left + right) and text == left + inner + right
            if around and left not in inner and right not in inner:
                text = inner
        if text.startswith("$") and text.count("$") == 1 and not re.match(r"\$\s*[-.\d]", text):
            text = text[1:]
        if text.endswith("$") and text.count("$") == 1:
            text = text[:-1]
        if text == before:
            return text


def ungrouped(text: str) -> str:
    """Return a text without the commas between groups of three digits."""
    return GROUPED.sub(lambda match: match[0].replace(",", ""), text)
