"""From characters to tokens: which tokens of a response hold its answer."""

from collections.abc import Callable, Sequence

from .extract import Place

Decode = Callable[[Sequence[int]], str]


def tokens_at(tokens: Sequence[int], place: Place, decode: Decode) -> Place:
    """The stretch of `tokens`, `[first, last)`, whose text covers the characters `place` of `decode(tokens)`.

    Found by bisection on the length of decoded beginnings, which no tokenizer shortens by more than a character that
    is still incomplete; about 2 log2(T) calls of `decode`. Never empty.
    """
    start, end = place
    first = _bisect(len(tokens), lambda count: len(decode(tokens[: count + 1])) > start)
    last = _bisect(len(tokens), lambda count: len(decode(tokens[:count])) >= end)
    first = min(first, len(tokens) - 1)
    return first, max(last, first + 1)


def _bisect(length: int, holds: Callable[[int], bool]) -> int:
    """The smallest of 0..length for which `holds`, where it holds from some number on; `length` if for none below."""
    low, high = 0, length
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low
