"""`urlvr pretrain`: small base policies by next-token prediction on a task's demonstrations.

The same Policy class trains them, so that a base is reproduced by the code that goes on with it. Bases are cached:
one folder for each content of the config.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from .algorithms.losses import LossInputs
from .analysis.estimators import NO_ANSWER, avg_at_n, balanced_accuracy, maj_at_n, parse_rate
from .config.model import ModelSection
from .config.parallel import ParallelSection
from .config.pretrain import ArchitectureSection, PretrainConfig, Snapshot
from .data.grading.annotate import annotate
from .data.tasks import Task, TaskPrompt, get_task
from .data.tasks.base import split_of
from .data.tokenizer import load_tokenizer, save_tokenizer
from .distributed.exchange import derive_seed, hand_over
from .distributed.layout import Layout, joined
from .exit_codes import ExitCode, UnusableInput
from .loop.engines import embedded_engine
from .policy.batch import Row
from .policy.optimizer import learning_rate
from .policy.policy import Policy
from .run.folder import RunDir, write_json
from .types import Group, Prompt, Sampling, TokenStats

SUMMARY = "pretraining.json"
MOST_PROMPTS = 60_000
"""Demonstrations are drawn anew each time, so that more prompts than this change nothing."""
JUDGED = 4
"""Responses to each held-out prompt that a base taught to judge is asked about."""


def base_dir(config: PretrainConfig) -> Path:
    """Folder that holds, or will hold, the config's snapshots: named by the hash of everything that shapes them."""
    tree = config.model_dump(mode="json")
    for name in ("name", "dir", "threads", "device"):
        tree["run"].pop(name)
    if config.optim.schedule_steps is None:  # so that bases from before there was this setting are found again
        tree["optim"].pop("schedule_steps")
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    return Path(config.run.dir) / f"{config.run.name}-{digest[:12]}"


@dataclass(frozen=True)
class Measured:
    """A base policy on the held-out prompts, at temperature 1."""

    step: int
    avg_at_16: float
    maj_at_16: float
    greedy: float
    parse_rate: float
    judge: float | None = None
    """Balanced accuracy of its own verdicts on its own responses, greedy; None where the task teaches none, or where
    no response is right, or none is wrong."""

    def __str__(self) -> str:
        judge = "" if self.judge is None else f", judge {self.judge:.3f}"
        return (
            f"step {self.step}: avg@16 {self.avg_at_16:.3f}, maj@16 {self.maj_at_16:.3f}, greedy {self.greedy:.3f},"
            f" parse rate {self.parse_rate:.3f}{judge}"
        )


class NextToken:
    """Negative log-likelihood of the demonstrations, each token weighted by its share in the batch."""

    needs = frozenset({"logp"})

    def __call__(self, stats: TokenStats, inputs: LossInputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """-sum weight * logp."""
        return -(stats.get("logp") * inputs.weight).sum(), {}

    def upstream(self, inputs: LossInputs) -> dict[str, torch.Tensor]:
        """The loss is linear in logp: its gradient is known before the forward."""
        return {"logp": -inputs.weight}

    def finish(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Nothing to divide: weights sum to one."""
        return dict(sums)


def main(config: PretrainConfig) -> int:
    """Train and save every snapshot, or say that they are there already. Returns the exit code."""
    folder = base_dir(config)
    done = folder / SUMMARY
    if not done.exists():
        with RunDir(folder).lock():
            if not done.exists():  # another process may have made it in the meantime
                _make(config, folder)
    for name, entry in json.loads(done.read_text()).items():
        point_to(folder / name)
        print(f"{folder / name}  {Measured(**entry['measured'])}{entry['note']}")
    return int(ExitCode.DONE)


def _make(config: PretrainConfig, folder: Path) -> None:
    torch.set_num_threads(config.run.threads)
    torch.manual_seed(config.run.seed)
    with joined(ParallelSection(), device=config.run.device, seed=config.run.seed) as layout:
        Pretraining(config, folder, layout).run()


class Pretraining:
    """One pretraining run."""

    def __init__(self, config: PretrainConfig, folder: Path, layout: Layout) -> None:
        self.config, self.folder = config, folder
        self.task: Task = get_task(config.data.task, config.data.settings)
        start_folder = folder / "start"
        longest = self._write_start(start_folder)
        parallel = ParallelSection(max_tokens_per_microbatch=max(16384, longest))
        self.policy = Policy(
            ModelSection(path=str(start_folder), dtype="float32"),
            parallel,
            layout,
            optim=config.optim,
            load_weights=False,
        )
        self.tokenizer = load_tokenizer(start_folder)
        self.engine = embedded_engine(start_folder, self.policy, self.tokenizer, max_batch=4096)
        self.grader = self.task.grader()
        held_out = self.task.prompts(config.data.held_out, seed=0, split="held_out")
        self.held_out = [(self._prompt(i, p.text, p.fields), p.label or "") for i, p in enumerate(held_out)]
        self.pending = dict(config.snapshots)
        self.saved: dict[str, dict[str, object]] = {}
        self.above: dict[str, int] = {}
        """Checks in a row above the band, by snapshot."""
        self.started = time.perf_counter()

    def run(self) -> None:
        """Train until every snapshot is saved. UnusableInput when a band was never reached."""
        config = self.config
        rng = random.Random(derive_seed(config.run.seed, "pretrain"))
        pool = self._training_prompts(min(config.run.steps * config.run.batch, MOST_PROMPTS))
        loss = NextToken()
        self.take_snapshots(0)
        for step in range(1, config.run.steps + 1):
            rows = [self._row(rng.choice(pool), rng) for _ in range(config.run.batch)]
            total = sum(len(row.response) for row in rows)
            for row in rows:
                row.weight = torch.full((len(row.response),), 1.0 / total)
            lr = learning_rate(config.optim, step - 1, steps=config.run.steps)
            metrics = self.policy.update(rows, loss, lr=lr)
            if step % 100 == 0:
                seconds = time.perf_counter() - self.started
                print(f"pretraining step {step}: loss {metrics['train/loss']:.3f}, {seconds:.0f} s", flush=True)
            self.take_snapshots(step)
            if not self.pending:
                break
        if missing := [name for name in self.pending if name not in self.saved]:
            raise UnusableInput(
                f"snapshots {', '.join(missing)} were not reached in run.steps = {config.run.steps};"
                " raise run.steps or lower maj_at_least"
            )
        write_json(self.folder / SUMMARY, self.saved)
        shutil.rmtree(self.folder / "start", ignore_errors=True)

    def _training_prompts(self, most: int) -> list[TaskPrompt]:
        """Distinct prompts of the training split: `most`, or all that a small task has."""
        drawn = (prompt for prompt in self.task.draw(self.config.run.seed) if split_of(prompt.text) == "train")
        return list(islice(drawn, most))

    def take_snapshots(self, step: int) -> None:
        """Save every pending snapshot whose rule holds after `step`."""
        by_step = [name for name, rule in self.pending.items() if rule.step == step]
        bands = {name: rule for name, rule in self.pending.items() if rule.maj_at_least is not None}
        check = bool(bands) and step > 0 and step % self.config.data.check_every == 0
        if not by_step and not check:
            return
        measured = self.measure(step)
        for name in by_step:
            self._save(name, measured)
            del self.pending[name]
        for name, rule in bands.items() if check else ():
            self._check_band(name, rule, measured)

    def _check_band(self, name: str, rule: Snapshot, measured: Measured) -> None:
        """Save the snapshot of a band at a check inside it, or above it if none was; done after the first or last."""
        above = rule.maj_at_most is not None and measured.maj_at_16 > rule.maj_at_most
        inside = measured.maj_at_16 >= (rule.maj_at_least or 0) and not above
        self.above[name] = self.above.get(name, 0) + 1 if above else 0
        if inside or (above and name not in self.saved):
            self._save(name, measured, f" (above the band's upper end {rule.maj_at_most})" if above else "")
        if name in self.saved and (rule.take == "first" or self.above[name] >= 2):
            del self.pending[name]

    def _save(self, name: str, measured: Measured, note: str = "") -> None:
        target = self.folder / name
        shutil.rmtree(target, ignore_errors=True)
        self.policy.save_hf(target)
        self.saved[name] = {"measured": vars(measured), "note": note}
        point_to(target)
        print(f"saved {target}  {measured}{note}", flush=True)

    def measure(self, step: int) -> Measured:
        """avg@16, maj@16, greedy accuracy, parse rate and judge's accuracy on the held-out prompts."""
        hand_over(self.policy, self.engine, self.policy.layout, version=step)
        longest = self.config.data.max_new_tokens
        seed = derive_seed(self.config.run.seed, "measure")
        sampled, right = self._sample(Sampling(16, longest, 1.0, seed=seed))
        _, greedy = self._sample(Sampling(1, longest, 0.0))
        classes = [[NO_ANSWER if c is None else c for c in group.classes] for group in sampled]
        return Measured(
            step=step,
            avg_at_16=float(avg_at_n(right).mean()),
            maj_at_16=float(maj_at_n(classes, right).mean()),
            greedy=float(avg_at_n(greedy).mean()),
            parse_rate=float(parse_rate(classes).mean()),
            judge=self._judge(sampled, right),
        )

    def _judge(self, sampled: list[Group], right: list[list[bool]]) -> float | None:
        """Balanced accuracy of the policy's verdicts on the first JUDGED samples of each prompt."""
        prompts, truths = list[Prompt](), list[bool]()
        for group, truth in zip(sampled, right, strict=True):
            for sample in group.samples[:JUDGED]:
                if (text := self.task.judge_text(group.prompt, sample.text)) is not None:
                    prompts.append(self._prompt(len(prompts), text, {}))
                    truths.append(truth[sample.index])
        said = [
            self.task.verdict(group.samples[0].text)
            for group in self.engine.generate(prompts, Sampling(1, self.config.data.max_new_tokens, 0.0))
        ]
        return balanced_accuracy(said, truths) if said else None

    def _sample(self, sampling: Sampling) -> tuple[list[Group], list[list[bool]]]:
        groups = list(self.engine.generate([prompt for prompt, _ in self.held_out], sampling))
        annotate(groups, lambda prompt: self.grader)
        right = [
            [self.grader.correct(answer, label) for answer in group.answers]
            for group, (_, label) in zip(groups, self.held_out, strict=True)
        ]
        return groups, right

    def _prompt(self, index: int, text: str, fields: dict[str, object]) -> Prompt:
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(f"held_out/{index}", text, tuple(tokens), fields)

    def _row(self, prompt: TaskPrompt, rng: random.Random) -> Row:
        """One of the task's examples, cut at the longest response."""
        ids = self.tokenizer([*self.task.example(prompt, rng)], add_special_tokens=False)["input_ids"]
        return Row(tuple(ids[0]), ids[1][: self.config.data.max_new_tokens])

    def _write_start(self, folder: Path) -> int:
        """config.json and tokenizer of the untrained model; returns the context length."""
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = self.task.tokenizer()
        save_tokenizer(tokenizer, folder)
        longest_prompt = max(len(p.text) for p in self.task.prompts(256, seed=0, split="train"))
        context = 1 << (2 * (longest_prompt + self.config.data.max_new_tokens)).bit_length()
        config = qwen2_config(self.config.model, len(tokenizer), context)
        config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        write_json(folder / "config.json", config)
        return context


def point_to(snapshot: Path) -> None:
    """`<run.dir>/<snapshot>`, a link to the snapshot made last: a path to write in configs."""
    link = snapshot.parent.parent / snapshot.name
    if link.exists() and not link.is_symlink():
        return
    fresh = link.with_name(f".{link.name}.{os.getpid()}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(Path(snapshot.parent.name) / snapshot.name)
    fresh.replace(link)


def qwen2_config(model: ArchitectureSection, tokenizer_size: int, context: int) -> dict[str, object]:
    """A Hugging Face config.json of a small Qwen2 model. UnusableInput when the vocabulary is too small."""
    vocab_size = model.vocab_size or tokenizer_size
    if vocab_size < tokenizer_size:
        raise UnusableInput(
            f"model.vocab_size = {vocab_size}, but the task's tokenizer has {tokenizer_size} entries;"
            f" use {tokenizer_size} or more, or leave it out"
        )
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": vocab_size,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": context,
        "initializer_range": model.init_std,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": model.tied,
        "use_sliding_window": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
    }
