r"""One spelling for answers that are written differently: `\dfrac12`, `\frac{1}{2}` and `1/2`; `1,000.0` and `1000`.

Only spelling is changed here; whether `2\sqrt{2}` is `\sqrt{8}` is left to math-verify. The conventions are those of
the MATH data set's grader (Hendrycks et al., arXiv 2103.03874): a degree or percent sign at the end is dropped (50% is
50, not 0.5), so are a leading currency sign and `x =`.
"""

import re
from fractions import Fraction
from functools import lru_cache

MAX_LENGTH = 2000
"""Longer answers, which are no answers, are only stripped."""

_WRAPPERS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_TEXT = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}")
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(?:(?:,|\{,\}|\\,|\\!,|,\\!)\d{3})+(?:\.\d+)?")
_NUMBER = re.compile(r"([+-]?)(\d*)(?:\.(\d*))?")
_FRACTION = re.compile(r"([+-]?)\\frac\{(\d+)\}\{(\d+)\}|([+-]?\d+)/(\d+)")
_MIXED = re.compile(r"([+-]?\d+)\s+(\d+)/(\d+)")
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]*[A-Za-z]")


@lru_cache(maxsize=65536)
def normalise(answer: str) -> str:
    """The canonical spelling of `answer`. Idempotent; may be empty."""
    if len(answer) > MAX_LENGTH:
        return answer.strip()
    previous = None
    while answer != previous:
        previous, answer = answer, _once(answer)
    return answer


def _once(text: str) -> str:
    """One pass over all rules; some make room for others, so `normalise` repeats it until nothing changes."""
    for rule in (_characters, _unwrap, _commands, _spaces, _ends, _fractions, _number):
        text = rule(text)
    return text


def _characters(text: str) -> str:
    """Plain minus signs and spaces."""
    return re.sub("[\u2212\u2013\ufe63\uff0d]", "-", re.sub("[\u00a0\u2009\u202f\t\n\r]", " ", text)).strip()


def _unwrap(text: str) -> str:
    """Math delimiters and braces around the whole are dropped."""
    for begin, end in _WRAPPERS:
        inner = text[len(begin) : len(text) - len(end)]
        if len(text) > len(begin) + len(end) and text.startswith(begin) and text.endswith(end) and begin not in inner:
            return inner.strip()
    if text.startswith("{") and text.endswith("}") and _closes(text) == len(text) - 1:
        return text[1:-1].strip()
    return text


def _closes(text: str) -> int:
    """Where the brace that opens `text` is closed; -1 if never."""
    depth = 0
    for index, character in enumerate(text):
        if character in "{}" and (index == 0 or text[index - 1] != "\\"):
            depth += 1 if character == "{" else -1
            if depth == 0:
                return index
    return -1


def _commands(text: str) -> str:
    """LaTeX that only changes how it looks: sizes, spacing, upright text, kinds of fractions."""
    if _THOUSANDS.fullmatch(text):
        return re.sub(r"[^\d.+-]", "", text)
    text = re.sub(r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\s*\.?", "", text)
    text = re.sub(r"\\(?:displaystyle|textstyle|limits)(?![a-zA-Z])\s*", "", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = _TEXT.sub(r"\1", text)
    return re.sub(r"\\[!,;: ]|~|\\q?quad(?![a-zA-Z])", " ", text)


def _spaces(text: str) -> str:
    """Spaces go, except between two letters or digits, where they separate words and the parts of `1 1/2`."""
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])", "", text)


def _ends(text: str) -> str:
    """What stands around an answer and is not part of it: `x =`, currency, degrees, percent, full stop, `(A)`."""
    text = re.sub(r"^[a-zA-Z]=(?!=)", "", text)
    text = re.sub(r"^(?:\\\$|\$)(?=[\d.-])", "", text)
    text = re.sub(r"(?:\^\{?\\circ\}?|°|\\degree|\\?%)$", "", text)
    text = re.sub(r"[.,;:]+$", "", text)
    return re.sub(r"^\(([A-Z])\)$", r"\1", text)


def _fractions(text: str) -> str:
    r"""`\frac12` gets its braces, a mixed number becomes one fraction, `3/4` alone becomes `\frac{3}{4}`."""
    text = re.sub(r"\\frac\s*(\d)\s*(\d)(?!\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\d)(?!\d)", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d)(?!\d)", r"\\sqrt{\1}", text)
    if mixed := _MIXED.fullmatch(text):
        whole, over, under = mixed.groups()
        return f"{whole}\\frac{{{over}}}{{{under}}}"
    if simple := re.fullmatch(r"([+-]?)(\d+)/(\d+)", text):
        sign, over, under = simple.groups()
        return f"{sign}\\frac{{{over}}}{{{under}}}"
    return text


def _number(text: str) -> str:
    """A number alone: no plus, no leading zeros, no trailing zeros after the point, no negative zero."""
    match = _NUMBER.fullmatch(text)
    if not match or not (match[2] or match[3]):
        return text
    whole = match[2].lstrip("0") or "0"
    decimals = (match[3] or "").rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return f"-{value}" if match[1] == "-" and value != "0" else value


def as_fraction(normalised: str) -> Fraction | None:
    """The value of an integer, decimal or simple fraction; None for everything else."""
    if match := _FRACTION.fullmatch(normalised):
        over = int(match[2]) * (-1 if match[1] == "-" else 1) if match[2] else int(match[4])
        under = int(match[3] or match[5])
        return Fraction(over, under) if under else None
    if re.fullmatch(r"-?\d+(?:\.\d+)?", normalised):
        return Fraction(normalised)
    return None


def is_words(normalised: str) -> bool:
    """Whether this is prose of at least three letters. math-verify would read it as a product: `dog` equals `god`."""
    return len(normalised) >= 3 and _WORDS.fullmatch(normalised) is not None
