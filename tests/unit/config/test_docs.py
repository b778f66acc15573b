"""The settings document themselves, and the page about them says what the models say."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from megatron_urlvr.config.docs import KINDS, documented_yaml, write_reference
from megatron_urlvr.config.root import Config
from megatron_urlvr.config.schema import describe, entry_annotation, model_at, tagged_models

PAGE = Path(__file__).parents[3] / "docs" / "config.md"


def leaves(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in model.model_fields.items():
        annotation = field.rebuild_annotation()
        annotation = entry_annotation(annotation) or annotation
        only = model_at(annotation, {})
        inside = list(tagged_models(annotation).values()) or ([only] if only else [])
        if not inside:
            yield f"{path}{name}", field
        for section in inside:
            yield from leaves(section, f"{path}{name}.")


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_says_what_it_means(kind):
    assert [path for path, field in leaves(KINDS[kind]) if not field.description] == []


@pytest.mark.parametrize("kind", KINDS)
def test_every_setting_stands_in_the_documented_schema_with_its_default(kind):
    text = documented_yaml(KINDS[kind])
    for path, field in leaves(KINDS[kind]):
        name = path.rsplit(".", 1)[-1]
        assert f" {name}: " in text or f"\n{name}: " in text
        if field.is_required():
            assert f"{name}: ..." in text


def test_options_of_rewards_and_settings_of_tasks_are_documented_with_the_config():
    text = documented_yaml(Config)
    assert "# reward.terms.<name>: options of the reward trajectory_entropy\n" in text
    assert "# reward.providers.<name>: options of the provider judge\n" in text
    assert "# settings of the task chain_sum\n" in text
    assert "\nanswer_width: 1\n" in text
    assert "answer_width" not in documented_yaml(Config, open_sections=False)


def test_the_page_about_configs_is_up_to_date():
    page = PAGE.read_text(encoding="utf-8")
    assert write_reference(page) == page, "run: python -m megatron_urlvr.config.docs docs/config.md"


def test_a_page_without_a_place_for_the_settings_is_refused():
    with pytest.raises(ValueError, match="has 0 places for the settings of train"):
        write_reference("# nothing")


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("run.steps", "an integer, at least 0"),
        ("parallel.dp", "'auto' or an integer, at least 1"),
        ("rollout.n_train", "an integer, at least 1 or null"),
        ("optim.beta1", "a number, at least 0, below 1"),
        ("model.dtype", "one of 'auto', 'float32', 'bfloat16'"),
        ("eval.sets.pass_k", "a list, each item an integer"),
        ("data.shuffle", "true or false"),
    ],
)
def test_what_a_setting_may_be_is_told_from_its_type(setting, words):
    field = dict(leaves(Config))[setting]
    assert describe(field.rebuild_annotation()) == words
