"""What a provider of signals is: what takes work (a judge's verdicts, an executor's) is fetched before scoring.

    reward.providers ─► get_provider(name)(options, context) ─► fetch(groups) fills group.signals ─► Reward.score

Providers run on the leader of each replica, side by side, on its own groups; their signals are then handed to the other
ranks of the replica.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Literal, NamedTuple, Protocol, TypeVar, cast

import torch

from megatron_urlvr.config.base import Section, rule, unread
from megatron_urlvr.registry import Registry
from megatron_urlvr.types import Group, Prompt, Sampling

from .base import NoOptions

OptionsT = TypeVar("OptionsT", bound=Section)

Weights = Literal["policy", "reference", "ema", "servers"]
"""Who is asked: the policy as it is, its starting weights, their moving average, or servers with weights of their
own."""


class AskedOptions(Section):
    """Options of a provider that asks a model."""

    weights: Weights = "policy"
    pool: str

    @classmethod
    def surviving(cls, parent: Mapping[str, Any], child: Mapping[str, Any]) -> dict[str, Any]:
        """A layer that asks other weights leaves the pool of the layers below."""
        dropped = {"pool"} if child.get("weights", "servers") != "servers" else set[str]()
        return {key: value for key, value in parent.items() if key not in dropped}

    @rule("weights", "pool")
    def _asks_the_pool(self) -> str | None:
        if self.weights != "servers" and (given := unread(self, "pool")):
            return (
                f"{given[0]} with weights = {self.weights!r}, which asks no pool: "
                "set weights=servers, or leave pool out"
            )
        return None


class Respondent(Protocol):
    """Somebody who answers prompts: a model with certain weights, and its tokenizer."""

    context: int
    """Longest prompt and response together, in tokens."""

    def encode(self, text: str, *, chat: bool) -> tuple[int, ...]:
        """Tokens of a prompt; `chat` puts it into one user message under the tokenizer's chat template."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Group]:
        """A group for each prompt, in order. RolloutFailed when nobody answers in time, Abandoned when asked to
        stop."""


class Answers(Protocol):
    """What a provider may do with answers: the part of a grader that it is given."""

    def extract(self, text: str, *, finished: bool = True) -> str | None: ...

    def equivalent(self, a: str, b: str) -> bool: ...

    def classes(self, answers: Sequence[str | None]) -> list[int | None]: ...


Checker = Callable[[Prompt, str], "bool | None"]
"""Whether a response holds, from prompt and text alone; None where it has no answer."""


@dataclass(frozen=True)
class ProviderContext:
    """What a run lends its providers. Labels are not among it."""

    seed: int
    """The run's."""
    respondent: Callable[[Weights, str], Respondent]
    """The model with the given weights; the second argument names the pool of `servers`."""
    answers_of: Callable[[Prompt], Answers]
    """How answers to a prompt are read and compared."""
    checkers_of: Callable[[Prompt], Mapping[str, Checker]]
    """The checkers of the task that made the prompt, by name; none for files."""


class Lesson(NamedTuple):
    """A group that the policy is trained on beside those of the run's prompts."""

    group: Group
    """One of the `beside` of a group: responses of the policy to a prompt of the provider's own."""
    rewards: torch.Tensor
    """`[k]` float32, one for each of its samples; advantages compare them with each other."""


class Request(NamedTuple):
    """What a provider asks a model for about one group."""

    prompts: int
    tokens: float
    """Of each prompt, beside `text`."""
    text: str
    """Words of the provider's own in each prompt."""
    samples: int
    """Answers to each prompt."""
    max_new_tokens: int
    once: bool = False
    """A prompt of the run is asked about once, not in every step that draws it."""


class Provider(ABC, Generic[OptionsT]):
    """Computes signals, concurrently with other providers, before the rewards are scored.

    Register a subclass with `register_provider`, or under the entry point group `megatron_urlvr.provider`; it is named
    in `reward.providers`, with its options beside the name.
    """

    name: ClassVar[str]
    provides: ClassVar[frozenset[str]]
    """Signals that `fetch` fills."""
    Options: ClassVar[type[Section]] = NoOptions

    def __init__(self, options: OptionsT | None = None, context: ProviderContext | None = None) -> None:
        self.options = options if options is not None else cast(OptionsT, type(self).Options())
        self._context = context
        self.memory: dict[str, Any] = {}
        """What it must not forget, JSON-able, by key. What `fetch` adds on one replica all others are told before the
        next, the first one first; checkpoints keep it."""

    @property
    def context(self) -> ProviderContext:
        """What the run lends. RuntimeError outside of a run."""
        if self._context is None:
            raise RuntimeError(f"provider {type(self).__name__} was made without a context and cannot ask anybody")
        return self._context

    @property
    def asks(self) -> Weights | None:
        """Whose responses it needs; None when it asks no model."""
        return None

    def request(self, n: int, prompt: float, response: float) -> Request | None:
        """What it asks for about a group of `n` responses of `response` tokens to a prompt of `prompt` tokens, for
        `urlvr plan`; None where it asks no model, or where nobody can say."""
        return None

    @property
    def remembers(self) -> bool:
        """Whether `fetch` may add to `memory`."""
        return False

    @property
    def teaches(self) -> bool:
        """Whether `lessons` may return any."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """Signals of other providers that `lessons` reads."""
        return frozenset()

    def lessons(self, group: Group) -> list[Lesson]:
        """What the policy is trained on beside `group`, once all signals are there: pure, and without labels. All
        lessons of a provider have equally many samples, two or more."""
        return []

    def problems(self, prompts: Sequence[Prompt]) -> Iterator[str]:
        """What keeps it from working on these prompts, a sentence each; asked before step 0."""
        return iter(())

    @abstractmethod
    async def fetch(self, groups: Sequence[Group]) -> None:
        """Fill `group.signals[name]`, `[n]` float32 and never NaN, for every name in `provides` and every group."""

    def close(self) -> None:
        """Give back processes and connections."""


ProviderClass = TypeVar("ProviderClass", bound=type[Provider[Any]])
_providers: Registry[type[Provider[Any]]] = Registry("provider")


def register_provider(cls: ProviderClass) -> ProviderClass:
    """Class decorator: make `cls` available under `cls.name`."""
    _providers.add(cls.name, cls)
    return cls


def get_provider(name: str) -> type[Provider[Any]]:
    """The provider class called `name`. UnknownName if there is none."""
    cls = _providers.get(name)
    if not (isinstance(cls, type) and issubclass(cls, Provider)):
        raise TypeError(f"provider {name!r} is {cls!r}, which is no subclass of megatron_urlvr.rewards.Provider")
    return cls


def available_providers() -> list[str]:
    """Names of all providers, those of installed entry points included."""
    return _providers.names()


def seed_of(seed: int, purpose: str, groups: Sequence[Group]) -> int:
    """Seed of what a provider samples for `groups`: another one for every version of the weights, the same on every
    replica and after a resume. Servers pay it no heed."""
    version = max((sample.version for group in groups for sample in group.samples), default=0)
    digest = hashlib.blake2b(f"{seed}/{purpose}/{version}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def fill(group: Group, name: str, values: Sequence[float]) -> None:
    """Set a signal of `group`, one number for each sample."""
    group.signals[name] = torch.tensor(list(values), dtype=torch.float32)
