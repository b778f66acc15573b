"""What every registered task must hold to; a new task is tested here without another line."""

import random
from importlib.metadata import EntryPoint

import pytest

from megatron_urlvr.config.data import TaskSource
from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.labels import LabelStore
from megatron_urlvr.data.sources import load_source
from megatron_urlvr.data.tasks import available, get_task, registry
from megatron_urlvr.data.tasks.chain_sum import ChainSum


@pytest.fixture(params=available())
def task(request):
    return get_task(request.param)


def test_settings_survive_being_written_and_read(task):
    written = task.settings.model_dump(mode="json")
    assert type(task)(written).settings == task.settings


def test_the_label_is_right_by_grader_and_by_checker(task):
    grader, tokenizer = task.grader(), task.tokenizer()
    for split in ("train", "held_out"):
        for prompt in task.prompts(50, seed=0, split=split):
            response = f"#{prompt.label}{tokenizer.eos_token}"
            assert task.check(prompt, response) is True
            assert grader.correct(grader.extract(f"#{prompt.label}"), prompt.label)
            assert "label" not in prompt.fields


def test_grader_and_checker_agree_on_every_demonstration(task):
    grader, tokenizer = task.grader(), task.tokenizer()
    rng = random.Random(1)
    for prompt in task.prompts(400, seed=1, split="train"):
        text = task.demonstration(prompt, rng)
        assert text.endswith(tokenizer.eos_token)
        assert tokenizer.decode(tokenizer(prompt.text + text)["input_ids"]) == prompt.text + text
        answer = grader.extract(text.removesuffix(tokenizer.eos_token))
        assert answer == grader.extract(text)
        verdict = task.check(prompt, text)
        assert (answer is None) is (verdict is None)
        assert grader.correct(answer, prompt.label) is bool(verdict)
        assert answer is None or grader.normalise(answer) == answer


def test_demonstrations_are_those_of_their_random_numbers(task):
    prompts = task.prompts(20, seed=0, split="train")
    first, second = ([task.demonstration(p, rng) for p in prompts] for rng in (random.Random(5), random.Random(5)))
    assert first == second


def test_the_task_loads_with_its_own_tokenizer(task):
    loaded = load_source(
        TaskSource(task=task.name, size=30),
        name="train",
        tokenizer=task.tokenizer(),
        labels=LabelStore(),
        split="train",
        seed=0,
        max_prompt_tokens=64,
        overlong="refuse",
    )
    assert len(loaded) == 30
    assert loaded.unlabelled == 0
    assert loaded.task.name == task.name


class LongSum(ChainSum):
    """A task as another package would bring it."""

    name = "long_sum"


def test_other_packages_bring_tasks_through_entry_points(monkeypatch):
    points = [
        EntryPoint(name="long_sum", value=f"{__name__}:LongSum", group=registry.GROUP),
        EntryPoint(name="broken", value="json:dumps", group=registry.GROUP),
        EntryPoint(name="chain_sum", value=f"{__name__}:LongSum", group=registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    assert "long_sum" in available()
    assert type(get_task("long_sum")).__name__ == "LongSum"
    assert type(get_task("chain_sum")) is ChainSum
    with pytest.raises(DataError, match="a subclass of Task is expected"):
        get_task("broken")
