"""Groups made by hand."""

from collections.abc import Callable, Sequence

import pytest
import torch

from megatron_urlvr.types import Group, Prompt, Sample, TokenStats

MakeGroup = Callable[..., Group]


def build(
    prompt: str = "p",
    *,
    classes: Sequence[int | None] | None = None,
    correct: Sequence[float] | None = None,
    lengths: Sequence[int] | None = None,
    **stats: Sequence[Sequence[float]],
) -> Group:
    """A group with the given classes, truths, and token statistics (one list of numbers for each sample)."""
    given = next((list(map(len, rows)) for rows in stats.values()), None)
    sizes = list(lengths or given or [1] * len(classes if classes is not None else correct or []))
    samples = []
    for i, size in enumerate(sizes):
        own = TokenStats(**{name: torch.tensor(rows[i], dtype=torch.float32) for name, rows in stats.items()})
        cls = classes[i] if classes is not None else None
        samples.append(
            Sample(
                prompt_id=prompt,
                index=i,
                tokens=[7] * size,
                text="",
                finish="stop",
                answer=None if cls is None else f"answer {cls}",
                stats=own if stats else None,
            )
        )
    signals = {} if correct is None else {"correct": torch.tensor(correct, dtype=torch.float32)}
    return Group(Prompt(prompt, prompt, (1,)), samples, list(classes or []), signals)


@pytest.fixture
def make_group() -> MakeGroup:
    return build
