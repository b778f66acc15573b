"""How well a base judges is measured on its own responses."""

from types import SimpleNamespace

import pytest

from megatron_urlvr.data.tasks import get_task
from megatron_urlvr.pretrain import JUDGED, Pretraining
from megatron_urlvr.types import Group, Prompt, Sample

RESPONSES = ("#9-2", "#9+2", "#9", "#?", "#9-2")


def measured(task_name: str, say) -> float | None:
    """Two prompts with five responses each, of which the first alone is right, judged by `say(text)`."""
    run = Pretraining.__new__(Pretraining)
    run.task = get_task(task_name, {})
    run.config = SimpleNamespace(data=SimpleNamespace(max_new_tokens=2))  # type: ignore[assignment]
    run.tokenizer = lambda text, **_: {"input_ids": list(map(ord, text))}  # type: ignore[assignment]
    asked: list[str] = []

    def generate(prompts, sampling):
        asked.extend(prompt.text for prompt in prompts)
        assert (sampling.n, sampling.temperature) == (1, 0.0)
        return [Group(p, [Sample(p.id, 0, [1], say(p.text), "stop")]) for p in prompts]

    run.engine = SimpleNamespace(generate=generate)  # type: ignore[assignment]
    prompt = Prompt("held_out/0", "9,2=7:", (1,), {"numbers": (9, 2), "target": 7, "digits": "92"})
    group = Group(prompt, [Sample(prompt.id, i, [1], text, "stop") for i, text in enumerate(RESPONSES)])
    found = run._judge([group, group], [[text == "#9-2" for text in RESPONSES]] * 2)
    assert len(asked) == (2 * JUDGED if task_name == "countdown" else 0)
    assert all(text.startswith("9,2=7:#9") or text == "9,2=7:#?@" for text in asked)
    return found


@pytest.mark.parametrize(
    ("say", "accuracy"),
    [
        (lambda text: "T" if text == "9,2=7:#9-2@" else "F", 1.0),
        (lambda text: "T", 0.5),
        (lambda text: "TF", 0.0),
        (lambda text: "F" if "?" in text else "T", (1 + 1 / 3) / 2),
    ],
)
def test_the_judge_is_scored_on_right_and_wrong_responses_alike(say, accuracy):
    assert measured("countdown", say) == pytest.approx(accuracy)


def test_a_task_that_teaches_no_judgement_has_no_judge():
    assert measured("chain_sum", lambda text: "T") is None
