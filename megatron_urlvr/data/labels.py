"""Where true answers live, away from anything a reward can see; every reading is counted by its purpose."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from .errors import DataError


class LabelStore:
    """True answers by prompt id.

    Rewards receive groups, and groups hold no labels. Only the audit, evaluation and rewards that declare
    themselves supervised are given this store, and `uses` records each reading for the report.
    """

    def __init__(self) -> None:
        self._labels: dict[str, str] = {}
        self.uses: Counter[str] = Counter()
        """Readings by purpose, those of prompts without a label included."""

    def add(self, prompt_id: str, label: str) -> None:
        """Keep `label` as the true answer of `prompt_id`. DataError if another one is there already."""
        known = self._labels.setdefault(prompt_id, label)
        if known != label:
            raise DataError(
                f"prompt {prompt_id!r} already has the label {known!r} and cannot get {label!r} too: "
                "two sets share a name; rename one of them"
            )

    def get(self, prompt_id: str, *, use: str) -> str | None:
        """The true answer of `prompt_id`, None if there is none.

        `use` names the reader in the report: `audit`, `evaluation:held_out`, `reward:ground_truth`.
        """
        if not use:
            raise ValueError("a label is read for a named use, such as 'audit'; `use` is empty")
        self.uses[use] += 1
        return self._labels.get(prompt_id)

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._labels

    def __len__(self) -> int:
        return len(self._labels)


def total_uses(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Readings by purpose, of all replicas together."""
    total: Counter[str] = Counter()
    for part in parts:
        total.update(part)
    return dict(total)


def uses_of(kept: Sequence[Mapping[str, int]], replica: int, replicas: int) -> dict[str, int]:
    """What `replica` goes on counting from, given what each replica had counted. Where they were not as many as the
    `replicas` of now, the first goes on from the total, and the others from nothing."""
    if len(kept) == replicas:
        return dict(kept[replica])
    return total_uses(kept) if replica == 0 else {}
