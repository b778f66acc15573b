"""Finding the answer in a response: the last box, the last `#`, the last match of a pattern."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*")


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` (or `\fbox`); None where there is none or it is never closed.

    Braces nest; escaped ones (`\{`) do not count. In `\boxed{\boxed{5}}` the inner one is the last. Without braces the
    box holds what follows up to the next space or `$`.
    """
    starts = list(_BOX.finditer(text))
    if not starts:
        return None
    begin = starts[-1].end()
    if not text.startswith("{", begin):
        return re.split(r"[\s$]", text[begin:], maxsplit=1)[0].strip()
    depth = 0
    escaped = False
    for index in range(begin, len(text)):
        character = text[index]
        if escaped or character == "\\":
            escaped = not escaped
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[begin + 1 : index].strip()
    return None


def last_hash(text: str, *, finished: bool) -> str | None:
    """What follows the last `#` on its line; None where there is no `#`.

    Nothing marks where such an answer ends but the end of the line or of the response, so in a response that was cut
    off (`finished` false) it counts only if a line end follows.
    """
    _, mark, tail = text.rpartition("#")
    if not mark:
        return None
    line, newline, _ = tail.partition("\n")
    if not newline and not finished:
        return None
    return line.strip()


def last_match(text: str, pattern: re.Pattern[str], *, finished: bool) -> str | None:
    """The group of the last match of `pattern`; None where nothing matches.

    In a response that was cut off, a match that reaches the end of the text does not count: it may be half an answer.
    """
    found = None
    for match in pattern.finditer(text):
        if finished or match.end() < len(text):
            found = match.group(1)
    return None if found is None else found.strip()
