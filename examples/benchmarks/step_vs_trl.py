"""One GRPO step in this program, in TRL's GRPOTrainer and in a bare hand-written loop, side by side in one process.

16 prompts of 7 tokens x 16 responses of exactly 16 tokens, a 2-layer 64-wide Qwen2 with 32 entries, float32, one
thread, one on-policy AdamW update with clipping, a random reward (so that nobody runs a scoring pass). The three take
turns step by step; a round's order is random. TRL is tuned for the job: no gradient checkpointing, no bf16, one
micro-batch, no KL. A step ends with weights that the next step samples from: this program's includes handing them to
its engine.

    pip install -e '.[bench]'
    python examples/benchmarks/step_vs_trl.py --rounds 40
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import DynamicCache, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

PROMPTS, VOTES, NEW_TOKENS = 16, 16, 16
VOCAB, NEVER = 32, 40
"""`NEVER` is an end-of-sequence id outside the model's logits: every response has exactly NEW_TOKENS tokens."""
DIGITS = 6


class Phases:
    """Seconds of each phase of one contender, step by step."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._open: dict[str, float] = defaultdict(float)

    def add(self, name: str, seconds: float) -> None:
        """Count `seconds` to a phase of the step in progress."""
        self._open[name] += seconds

    def close(self, seconds: float) -> None:
        """End the step."""
        self.steps.append(seconds)
        for name, value in self._open.items():
            self.seconds[name].append(value)
        self._open.clear()

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, its time counted to a phase."""

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.add(name, time.perf_counter() - started)

        return wrapped


def model_folder() -> Path:
    """A Hugging Face folder of the benchmark's model, random weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        use_sliding_window=False,
        bos_token_id=None,
        eos_token_id=NEVER,
        pad_token_id=20,
    )
    folder = Path(tempfile.mkdtemp(prefix="step_vs_trl_"))
    Qwen2ForCausalLM(config).float().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def tokenizer() -> PreTrainedTokenizerFast:
    """One character, one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    characters = [*"0123456789=+-#,abcdef", *(chr(0x3B1 + i) for i in range(NEVER - 20))]
    table = {character: i for i, character in enumerate(characters[:20])}
    table |= {"<pad>": 20} | {f"<{i}>": i for i in range(21, NEVER)} | {"<never>": NEVER}
    backend = Tokenizer(models.WordLevel(table, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<never>", pad_token="<pad>", unk_token="<pad>", padding_side="left"
    )


def draw_prompt(rng: random.Random) -> str:
    """Six digits and an equals sign."""
    return "".join(str(rng.randrange(10)) for _ in range(DIGITS)) + "="


def ours(folder: Path) -> tuple[Callable[[], None], Phases]:
    """This program: its policy, engine, reward, advantage and loss, as the training loop calls them."""
    from megatron_urlvr.algorithms.advantages import get_advantage
    from megatron_urlvr.algorithms.losses import build_loss, token_weights
    from megatron_urlvr.config.algorithm import KLSection, LossSection
    from megatron_urlvr.config.model import ModelSection
    from megatron_urlvr.config.optim import OptimSection
    from megatron_urlvr.config.parallel import ParallelSection
    from megatron_urlvr.config.reward import RewardSection, TermSection
    from megatron_urlvr.distributed.layout import start
    from megatron_urlvr.loop.engines import embedded_engine
    from megatron_urlvr.policy.batch import Row
    from megatron_urlvr.policy.policy import Policy
    from megatron_urlvr.rewards import build_terms
    from megatron_urlvr.types import Prompt, Sampling

    parallel = ParallelSection()
    policy = Policy(ModelSection(path=str(folder)), parallel, start(parallel), optim=OptimSection(lr=1e-3))
    tokens = tokenizer()
    engine = embedded_engine(folder, policy, tokens, max_batch=4096)
    reward = build_terms(RewardSection(terms={"main": TermSection(name="random")}), advantage="grpo", seed=0)
    advantage, loss = get_advantage("grpo"), build_loss(LossSection(), KLSection())
    phases, rng, count = Phases(), random.Random(0), 0

    def push() -> None:
        engine.begin_update(count)
        engine.update(policy.export())
        engine.end_update()

    def generate() -> Any:
        prompts = []
        for i in range(PROMPTS):
            text = draw_prompt(rng)
            prompts.append(Prompt(f"{count}/{i}", text, tuple(tokens(text, add_special_tokens=False)["input_ids"])))
        return list(engine.generate(prompts, Sampling(VOTES, NEW_TOKENS, 1.0, seed=count)))

    def make_rows(groups: Any) -> list[Row]:
        rewards = torch.stack([result.total for result in reward.score_groups(groups)])
        advantages = advantage(rewards).reshape(-1).tolist()
        rows = [Row(group.prompt.tokens, sample.tokens) for group in groups for sample in group.samples]
        lengths = torch.tensor([len(row.response) for row in rows])
        weights = token_weights(
            lengths, "token_mean", total_tokens=int(lengths.sum()), total_sequences=len(rows), max_new_tokens=NEW_TOKENS
        ).split(lengths.tolist())
        for row, value, weight in zip(rows, advantages, weights, strict=True):
            row.advantage, row.weight = value, weight
        return rows

    def step() -> None:
        nonlocal count
        groups = phases.timed("generate", generate)()
        assert all(sample.length == NEW_TOKENS for group in groups for sample in group.samples)
        rows = phases.timed("reward", make_rows)(groups)
        phases.timed("forward + backward + optimizer", policy.update)(rows, loss, lr=1e-3)
        count += 1
        phases.timed("weights to the engine", push)()

    push()
    return step, phases


def trl(folder: Path, steps: int) -> tuple[Any, Phases]:
    """TRL's GRPOTrainer, paused after each step by its own callback."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    rng, phases = random.Random(0), Phases()
    prompts = Dataset.from_dict({"prompt": [draw_prompt(rng) for _ in range(PROMPTS * steps)]})

    def reward(prompts: list[str], completions: list[str], completion_ids: Any = None, **_: Any) -> list[float]:
        assert all(len(ids) == NEW_TOKENS for ids in completion_ids)
        return [rng.random() for _ in completions]

    arguments = GRPOConfig(
        output_dir=tempfile.mkdtemp(prefix="step_vs_trl_"),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_steps=steps,
        num_generations=VOTES,
        max_completion_length=NEW_TOKENS,
        per_device_train_batch_size=PROMPTS * VOTES,
        gradient_checkpointing=False,
        bf16=False,
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        logging_steps=10**9,
    )
    model = Qwen2ForCausalLM.from_pretrained(folder).float()
    model.generation_config.eos_token_id = NEVER
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=arguments, train_dataset=prompts, processing_class=tokenizer()
    )
    trainer._generate_and_score_completions = phases.timed("generate", trainer._generate_and_score_completions)
    trainer.compute_loss = phases.timed("forward", trainer.compute_loss)
    trainer.accelerator.backward = phases.timed("backward", trainer.accelerator.backward)
    return trainer, phases


def hand_loop(folder: Path) -> tuple[Callable[[], None], Phases]:
    """What one would write by hand over the transformers model: sampling with its cache, loss, fused AdamW."""
    model = Qwen2ForCausalLM.from_pretrained(folder).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    tokens, rng, phases = tokenizer(), random.Random(0), Phases()

    @torch.no_grad()
    def generate() -> tuple[torch.Tensor, torch.Tensor]:
        ids = tokens([draw_prompt(rng) for _ in range(PROMPTS)], add_special_tokens=False)["input_ids"]
        prompts = torch.tensor(ids).repeat_interleave(VOTES, 0)
        cache, sampled, inputs = DynamicCache(config=model.config), [], prompts
        for _ in range(NEW_TOKENS):
            output = model(input_ids=inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            inputs = torch.multinomial(output.logits[:, -1].softmax(-1), 1)
            sampled.append(inputs)
        return prompts, torch.cat(sampled, 1)

    def advantages() -> torch.Tensor:
        rewards = torch.tensor([rng.random() for _ in range(PROMPTS * VOTES)]).view(PROMPTS, VOTES)
        scaled = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-6)
        return scaled.view(-1, 1)

    def forward(prompts: torch.Tensor, responses: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
        sequences = torch.cat([prompts, responses], 1)
        logits = model(input_ids=sequences, use_cache=False, logits_to_keep=NEW_TOKENS + 1).logits[:, :-1]
        logp = logits.log_softmax(-1)
        chosen = logp.gather(-1, responses[..., None])[..., 0]
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1).mean()
        assert entropy >= 0
        return -((chosen - chosen.detach()).exp() * advantage).mean()

    def optimise() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def step() -> None:
        prompts, responses = phases.timed("generate", generate)()
        advantage = phases.timed("reward", advantages)()
        loss = phases.timed("forward", forward)(prompts, responses, advantage)
        phases.timed("backward", loss.backward)()
        phases.timed("optimizer", optimise)()

    return step, phases


def run(rounds: int, warm_up: int) -> dict[str, Phases]:
    """Every contender's phases over `rounds` rounds, after `warm_up` that are dropped."""
    from transformers import TrainerCallback

    folder = model_folder()
    total = rounds + warm_up
    step_ours, phases_ours = ours(folder)
    step_hand, phases_hand = hand_loop(folder)
    trainer, phases_trl = trl(folder, total)
    order = random.Random(1)

    class TakeTurns(TrainerCallback):
        """TRL owns its loop: the other two take their steps in its callbacks, before or after its own at random."""

        before: list[tuple[Callable[[], None], Phases]]
        after: list[tuple[Callable[[], None], Phases]]
        started: float

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            others = [(step_ours, phases_ours), (step_hand, phases_hand)]
            order.shuffle(others)
            cut = order.randrange(3)
            self.before, self.after = others[:cut], others[cut:]
            for step, phases in self.before:
                take(step, phases)
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            phases_trl.close(time.perf_counter() - self.started)
            for step, phases in self.after:
                take(step, phases)

    # TRL generates, trains and steps its optimizer between the two callbacks.
    trainer.add_callback(TakeTurns())
    trainer.train()
    found = {"this program": phases_ours, "TRL": phases_trl, "hand loop": phases_hand}
    for phases in found.values():
        phases.steps = phases.steps[warm_up:]
        phases.seconds = {name: values[warm_up:] for name, values in phases.seconds.items()}  # type: ignore[assignment]
    return found


def take(step: Callable[[], None], phases: Phases) -> None:
    """One timed step."""
    started = time.perf_counter()
    step()
    phases.close(time.perf_counter() - started)


def ratio(a: Phases, b: Phases) -> dict[str, float]:
    """Median and quartiles, over rounds, of a's step time divided by b's in the same round."""
    each = sorted(x / y for x, y in zip(a.steps, b.steps, strict=True))
    quartiles = statistics.quantiles(each, n=4)
    return {"median": quartiles[1], "q1": quartiles[0], "q3": quartiles[2]}


def main() -> None:
    """Run, print a table, write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = run(options.rounds, options.warm_up)
    mine = found["this program"]
    result: dict[str, Any] = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "load": os.getloadavg()[0],
        "TRL / this program": ratio(found["TRL"], mine),
        "this program / hand loop": ratio(mine, found["hand loop"]),
        "contenders": {},
    }
    for name, phases in found.items():
        medians = {phase: statistics.median(values) for phase, values in phases.seconds.items()}
        result["contenders"][name] = {"step": statistics.median(phases.steps), "phases": medians}
        line = ", ".join(f"{phase} {1e3 * value:.0f}" for phase, value in medians.items())
        print(f"{name:>14}: {1e3 * statistics.median(phases.steps):6.1f} ms a step ({line})")
    for name in ("TRL / this program", "this program / hand loop"):
        r = result[name]
        print(f"{name}: {r['median']:.2f} (quartiles {r['q1']:.2f} to {r['q3']:.2f}, {options.rounds} rounds)")
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
