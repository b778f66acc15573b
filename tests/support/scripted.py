"""Models that answer as they are told, and providers that ask them about Countdown responses."""

import asyncio

from megatron_urlvr.data.tasks.countdown import CountdownGrader
from megatron_urlvr.rewards import ProviderContext, get_provider
from megatron_urlvr.types import Group, Prompt, Sample


class Scripted:
    """Answers every prompt with what `say` makes of its text; remembers what it was asked."""

    def __init__(self, say, context=10_000):
        self.say, self.context, self.asked = say, context, []

    def encode(self, text, *, chat):
        return tuple(map(ord, f"<user>{text}" if chat else text))

    def generate(self, prompts, sampling):
        self.asked.append((list(prompts), sampling))
        groups = []
        for prompt in prompts:
            text = "".join(map(chr, prompt.tokens))
            said = [self.say(text, k) for k in range(sampling.n)]
            groups.append(Group(prompt, [Sample(prompt.id, k, [1], s, "stop") for k, s in enumerate(said)]))
        return groups


def provider(name, respondent=None, task=None, **options):
    cls = get_provider(name)
    context = ProviderContext(
        seed=3,
        respondent=lambda weights, pool: respondent,
        answers_of=lambda prompt: CountdownGrader(),
        checkers_of=lambda prompt: {} if task is None else task.checkers(),
    )
    return cls(cls.Options(**options), context)


def fetch(provider, *groups):
    asyncio.run(provider.fetch(groups))
    return groups[0]


def responses(texts, prompt="9,2=7:", version=0, id="train/1", **fields):
    fields = {"numbers": (9, 2), "target": 7, **fields}
    samples = [Sample(id, i, [1], text, "stop", version=version) for i, text in enumerate(texts)]
    grader = CountdownGrader()
    for sample in samples:
        sample.answer = grader.extract(sample.text)
    group = Group(Prompt(id, prompt, tuple(map(ord, prompt)), fields), samples)
    group.classes = grader.classes(group.answers)
    return group
