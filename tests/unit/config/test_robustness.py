"""Whatever stands in a YAML file, loading ends with a config or with sentences."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.config.errors import validate
from megatron_urlvr.config.loader import Layers
from megatron_urlvr.config.root import Config

TREE: dict[str, Any] = {
    "run": {"name": "small", "dir": "runs/small", "steps": 10, "seed": 0},
    "model": {"path": "bases/small"},
    "data": {"train": {"task": "chain_sum", "size": 64, "settings": {"digits": 4}}},
    "eval": {"every": 2, "sets": {"task": {"task": "chain_sum", "size": 4}, "file": {"path": "x", "pass_k": [2]}}},
    "rollout": {"prompts": 8, "n_votes": 4, "max_new_tokens": 16},
    "reward": {"terms": {"main": {"name": "trajectory_entropy", "aggregation": "sum"}}},
    "algorithm": {"mini_batch": 4, "kl": {"reference": "start"}},
    "optim": {"lr": 0.001},
}
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 40), st.floats(), st.sampled_from(["", "auto", "task", "chain_sum", "x"])
)
keys = st.sampled_from(["name", "task", "path", "settings", "main", "terms", "jsonl", "weight", "", "0"])
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)


def paths(tree: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, key)
            yield from paths(value, (*path, key))


def put(tree: dict[str, Any], path: tuple[str, ...], value: object) -> None:
    for key in path[:-1]:
        if not isinstance(tree.get(key), dict):
            return
        tree = tree[key]
    tree[path[-1]] = value


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.sampled_from(sorted(paths(TREE))), values), min_size=1, max_size=4))
def test_a_bent_config_is_accepted_or_answered_in_sentences(bends):
    tree = copy.deepcopy(TREE)
    for path, value in bends:
        put(tree, path, value)
    config, sentences = validate(Config, tree)
    assert (config is None) == bool(sentences)
    assert all(sentence.endswith((".", "?")) for sentence in sentences)
    assert len(set(sentences)) == len(sentences)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(TREE)), values, max_size=4))
def test_any_layer_may_be_laid_over_another(layer):
    layers = Layers(Config)
    layers._lay(copy.deepcopy(TREE))
    layers._lay(layer)
    config, sentences = validate(Config, layers.tree, layers.hints)
    assert (config is None) == bool(sentences)
