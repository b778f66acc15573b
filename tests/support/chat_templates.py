"""Which models of the recipes have a chat template: what plans, which read no tokenizer, cannot see."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megatron_urlvr.config.data import TableSource
from megatron_urlvr.config.root import Config

HAS_CHAT_TEMPLATE = {
    "Llama-3.1-70B": False,
    "Llama-3.1-8B": False,
    "Qwen2.5-1.5B": True,
    "Qwen2.5-32B": True,
    "Qwen2.5-72B": True,
    "Qwen2.5-7B": True,
    "Qwen2.5-Math-1.5B": True,
    "Qwen2.5-Math-7B": True,
    "Qwen3-1.7B-Base": True,
    "Qwen3-32B": True,
    "Qwen3-4B-Base": True,
    "Qwen3-8B-Base": True,
    "Qwen3-30B-A3B": True,
}
"""From `tokenizer_config.json` on the Hugging Face hub: Qwen's base models ship one, Meta's do not."""


def sources_that_cannot_start(config: Config) -> Iterator[str]:
    """Names of sources whose template asks for a chat template that the model does not have, or passes over one."""
    wanted = "chat" if HAS_CHAT_TEMPLATE[Path(config.model.path).name] else "plain"
    for name, source in {"train": config.data.train, **config.eval.sets}.items():
        if isinstance(source, TableSource) and source.template != wanted:
            yield name
