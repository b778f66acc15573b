"""The documented schema: every setting with its default, what it may be and what it means, from the models alone.

`python -m megatron_urlvr.config.docs docs/config.md` writes it between the markers of that page.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from .base import Section
from .mcs import McsConfig
from .pretrain import PretrainConfig
from .root import Config
from .schema import describe, entry_annotation, model_at, tagged_models
from .study import StudyConfig

WIDTH = 118
KINDS: dict[str, type[Section]] = {
    "train": Config,
    "pretrain": PretrainConfig,
    "study": StudyConfig,
    "mcs": McsConfig,
}


def documented_yaml(model: type[Section], *, open_sections: bool = True) -> str:
    """All settings of `model` as commented YAML. `...` stands where a value must be given.

    `open_sections`: then also the options of every reward and provider, and the settings of every task, that is
    installed.
    """
    lines = [*_section(model, 0)]
    for title, models in _open_sections(model) if open_sections else ():
        for name, options in models.items():
            if options.model_fields:
                lines += ["", f"# {title} {name}", *_section(options, 0)]
    return "\n".join(lines) + "\n"


def write_reference(page: str) -> str:
    """`page` with the settings of each kind of config written anew between its markers, such as `<!-- train -->` and
    `<!-- /train -->`. ValueError where a marker is missing."""
    for kind, model in KINDS.items():
        block = f"<!-- {kind} -->\n```yaml\n{documented_yaml(model, open_sections=False)}```\n<!-- /{kind} -->"
        places = re.split(f"<!-- {kind} -->.*<!-- /{kind} -->", page, flags=re.DOTALL)
        if len(places) != 2:
            raise ValueError(f"the page has {len(places) - 1} places for the settings of {kind}; it needs one")
        page = block.join(places)
    return page


def _section(model: type[BaseModel], depth: int) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield from _setting(name, field, depth)


def _setting(name: str, field: FieldInfo, depth: int) -> Iterator[str]:
    annotation = field.rebuild_annotation()
    entry = entry_annotation(annotation)
    kinds = _models(annotation if entry is None else entry)
    yield from _comment(field.description, depth)
    if not kinds:
        yield from _comment(f"({describe(annotation)})", depth)
        yield f"{'  ' * depth}{name}: {_default(field)}"
        return
    yield f"{'  ' * depth}{name}:"
    if entry is not None:
        depth += 1
        yield f"{'  ' * depth}<name>:"
    for index, kind in enumerate(kinds):
        if index:
            yield from _comment("--- or ---", depth + 1)
        if len(kinds) > 1:
            yield from _comment(kind.__doc__, depth + 1)
        yield from _section(kind, depth + 1)


def _models(annotation: Any) -> list[type[BaseModel]]:
    if tagged := tagged_models(annotation):
        return list(tagged.values())
    model = model_at(annotation, {})
    return [model] if model is not None else []


def _comment(text: str | None, depth: int) -> Iterator[str]:
    indent = "  " * depth + "# "
    yield from textwrap.wrap(" ".join((text or "").split()), WIDTH, initial_indent=indent, subsequent_indent=indent)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "..."
    value = field.get_default(call_default_factory=True)
    if isinstance(value, list | dict):
        return json.dumps(value)  # on one line
    text = OmegaConf.to_yaml(OmegaConf.create([value])).strip()
    return text.removeprefix("- ")


def _open_sections(model: type[Section]) -> Iterator[tuple[str, dict[str, type[BaseModel]]]]:
    """What stands in the places that the models leave open, by title."""
    from megatron_urlvr.data.tasks import registry as tasks
    from megatron_urlvr.rewards import providers
    from megatron_urlvr.rewards import registry as rewards

    if "reward" in model.model_fields:
        yield (
            "reward.terms.<name>: options of the reward",
            {name: rewards.get_reward(name).Options for name in rewards.available()},
        )
        yield (
            "reward.providers.<name>: options of the provider",
            {name: providers.get_provider(name).Options for name in providers.available_providers()},
        )
    if "data" in model.model_fields:
        yield "settings of the task", {name: tasks.task_class(name).Settings for name in tasks.available()}


if __name__ == "__main__":
    _page = Path(sys.argv[1])
    _page.write_text(write_reference(_page.read_text(encoding="utf-8")), encoding="utf-8")
