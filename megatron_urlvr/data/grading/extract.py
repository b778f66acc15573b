"""Finding the answer in a response: the last box, the last `#`, the last match of a pattern."""


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
