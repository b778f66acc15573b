"""Finding the answer in a response: the last box, the last `#`, the last match of a pattern."""

import re
from collections.abc import Mapping

Place = tuple[int, int]
"""Where an answer begins and ends in a text, in characters."""
_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
"""A brace, or what a backslash escapes."""


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox`); None where there is none or it is never closed.

    Braces nest; escaped ones (`\{`) do not count. In `\boxed{\boxed{5}}` the inner one is the last. Without braces the
    box holds what follows up to the next space or `$`.
    """
    return _at(text, boxed_place(text))


def boxed_place(text: str) -> Place | None:
    """Where the content of the last box stands; see `last_boxed`."""
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    begin = starts[-1].end()
    return _content_place(text, begin, _closings(text, begin))


def all_boxed(text: str) -> list[str]:
    """The contents of all boxes that are closed, in order; see `last_boxed`."""
    closings = _closings(text, 0)
    places = [_content_place(text, start.end(), closings) for start in _BOX.finditer(text)]
    return [text[place[0] : place[1]] for place in places if place is not None]


def _content_place(text: str, begin: int, closings: Mapping[int, int]) -> Place | None:
    """Where the content of the box stands whose brace is expected at `begin`."""
    if not text.startswith("{", begin):
        return _trimmed(text, begin, begin + len(re.split(r"[\s$]", text[begin:], maxsplit=1)[0]))
    return _trimmed(text, begin + 1, closings[begin]) if begin in closings else None


def _closings(text: str, begin: int) -> dict[int, int]:
    """Where each brace that opens from `begin` on is closed, if it is: in one pass, however deep they nest."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for brace in _BRACE.finditer(text, begin):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            found[opened.pop()] = brace.start()
    return found


def last_hash(text: str, *, finished: bool) -> str | None:
    """What follows the last `#` on its line; None where there is no `#`.

    Nothing marks where such an answer ends but the end of the line or of the response, so in a response that was cut
    off (`finished` false) it counts only if a line end follows.
    """
    return _at(text, hash_place(text, finished=finished))


def hash_place(text: str, *, finished: bool) -> Place | None:
    """Where what follows the last `#` stands; see `last_hash`."""
    mark = text.rfind("#")
    if mark < 0:
        return None
    end = text.find("\n", mark)
    if end < 0 and not finished:
        return None
    return _trimmed(text, mark + 1, len(text) if end < 0 else end)


def last_match(text: str, pattern: re.Pattern[str], *, finished: bool) -> str | None:
    """The group of the last match of `pattern`; None where nothing matches.

    In a response that was cut off, a match that reaches the end of the text does not count: it may be half an answer.
    """
    return _at(text, match_place(text, pattern, finished=finished))


def match_place(text: str, pattern: re.Pattern[str], *, finished: bool) -> Place | None:
    """Where the group of the last match stands; see `last_match`."""
    found: Place | None = None
    for match in pattern.finditer(text):
        if finished or match.end() < len(text):
            found = None if match.group(1) is None else match.span(1)
    return None if found is None else _trimmed(text, *found)


def _trimmed(text: str, start: int, end: int) -> Place:
    """`start` and `end` without the spaces inside them."""
    piece = text[start:end]
    start += len(piece) - len(piece.lstrip())
    return start, start + len(piece.strip())


def _at(text: str, place: Place | None) -> str | None:
    return None if place is None else text[place[0] : place[1]]
