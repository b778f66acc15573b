"""Early voting: when the rest of a prompt's votes cannot change its majority any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from ..data.grading.grader import Grader
from .answers import Answer


def decided(tally: Mapping[str, int], missing: int, *, exact: bool) -> bool:
    """Whether `missing` more votes can change who wins, whatever they are. `tally`: votes by answer.

    `exact`: different strings are different answers. Otherwise any of them may turn out to be the same answer as any
    other but the leader's own, and together they must not reach it.
    """
    if not tally:
        return False
    leader, *others = sorted(tally.values(), reverse=True)
    rival = max(others, default=0) if exact else sum(others)
    return leader > rival + missing


class EarlyVotes:
    """Reads votes as they come, and counts what was saved. Lives on the event loop's thread."""

    def __init__(self, grader: Grader, decode: Callable[[Sequence[int]], str]) -> None:
        self.grader, self.decode = grader, decode
        self.exact = type(grader).equivalent is Grader.equivalent
        self.counts: Counter[str] = Counter()

    def read(self, answer: Answer) -> str | None:
        """The vote of `answer`; None for a response without one."""
        text = self.decode(answer.tokens[:-1] if answer.finish == "stop" else answer.tokens)
        found = self.grader.extract(text, finished=answer.finish == "stop")
        return None if found is None else self.grader.normalise(found)

    def gave_up(self, responses: int, lengths: Collection[int]) -> None:
        """`responses` of a prompt were given up, whose finished ones have `lengths` tokens."""
        self.counts.update(groups=1, responses=responses, tokens=round(responses * sum(lengths) / len(lengths)))

    def take(self) -> dict[str, float]:
        """`rollout/early/groups` whose sampling ended early, `rollout/early/responses` that were given up, and
        `rollout/early/tokens` that they would have had at the mean length of their prompts' others (what had been
        sampled of them included); then starts at zero."""
        taken, self.counts = self.counts, Counter()
        return {f"rollout/early/{name}": float(taken[name]) for name in ("groups", "responses", "tokens")}
