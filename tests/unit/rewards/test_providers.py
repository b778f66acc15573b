"""Providers against models that answer as they are told: verdicts, other votes, checkers."""

import json
from types import SimpleNamespace

import pytest
import torch
from replicas import Replicas
from scripted import Scripted, fetch, provider, responses

from megatron_urlvr.data.tasks import get_task
from megatron_urlvr.data.tasks.countdown import CountdownGrader
from megatron_urlvr.loop.signals import Signals
from megatron_urlvr.rewards import MissingSignalError, get_provider, get_reward
from megatron_urlvr.rewards.judge import TEMPLATE, JudgeOptions, judge_text, read_verdict
from megatron_urlvr.types import Prompt, Sample


class TestVerdicts:
    @pytest.mark.parametrize(
        ("text", "verdict"),
        [
            (r"so \boxed{True}", "yes"),
            (r"so \boxed{ false }", "no"),
            (r"\boxed{False}, no wait: \boxed{True}", None),  # both
            (r"\boxed{\text{True}}", "yes"),
            (r"so $\boxed{\mathrm{False}}$.", "no"),
            (r"\boxed {True}", "yes"),
            (r"\boxed{\textbf{ false }.}", "no"),
            (r"\boxed{{True}}", "yes"),
            (r"\boxed{\text{True}} or \boxed{\text{False}}", None),
            (r"\boxed{\text{True or False}}", None),
            (r"\boxed{\text{Untrue}}", None),
            (r"\boxed{\text{True}", None),
            ("True", None),
            (r"\boxed{True", None),
            (r"\boxed{True} \boxed{True}", "yes"),
            (r"\boxed{Maybe}", None),
            ("", None),
        ],
    )
    def test_only_one_clear_box_is_a_verdict(self, text, verdict):
        assert read_verdict(text, JudgeOptions(max_new_tokens=1)) == verdict

    @pytest.mark.parametrize(("text", "verdict"), [(" = ", "yes"), ("?", "no"), ("=?", None), ("", None)])
    def test_a_whole_answer_can_be_the_verdict(self, text, verdict):
        options = JudgeOptions(max_new_tokens=1, verdict="whole", yes="=", no="?")
        assert read_verdict(text, options) == verdict

    def test_braces_reach_the_judge_as_they_are(self):
        sample = Sample("p", 0, [1], r"\boxed{\frac{1}{2}} {question} {x}", "stop")
        text = judge_text(TEMPLATE, Prompt("p", "solve {response}", (1,)), sample)
        assert "Question: solve {response}\n" in text
        assert "Solution: \\boxed{\\frac{1}{2}} {question} {x}\n" in text
        assert text.count(r"\boxed{True}") == text.count(r"\boxed{False}") == 1
        assert "{{" not in text
        assert judge_text("{response}|{question}", Prompt("p", "q", (1,)), sample) == f"{sample.text}|q"

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"template": "judge {question}"}, "placeholder {response}"),
            ({"yes": "a", "no": "A "}, "two different words"),
        ],
    )
    def test_a_judge_that_could_not_judge_is_refused(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            JudgeOptions(max_new_tokens=1, **options)


class TestJudge:
    def test_the_reward_is_the_share_of_yes_and_no_verdict_counts_as_no(self):
        def say(text, k):
            if "9-2" in text:
                return r"\boxed{True}"
            return (r"\boxed{False}", "well", r"\boxed{True}", r"\boxed{True}\boxed{False}")[k]

        judge = Scripted(say)
        group = fetch(provider("judge", judge, max_new_tokens=8, samples=4), responses(["#9-2", "#9+2"]))
        reward = get_reward("self_verification")()
        scores = reward.score(group)
        assert scores.tolist() == [1.0, 0.25]
        assert reward.counts([group], [scores]) == [{"unparsable": 0.25, "unanimous": 0.0}]
        ((prompts, sampling),) = judge.asked
        assert (sampling.n, sampling.temperature, sampling.max_new_tokens) == (4, 0.5, 8)
        assert len({prompt.id for prompt in prompts}) == 2

    def test_what_is_too_long_for_the_judge_has_no_verdict(self):
        judge = Scripted(lambda text, k: r"\boxed{True}", context=len(TEMPLATE) + 20)
        group = fetch(provider("judge", judge, max_new_tokens=8), responses(["#9-2", "x" * 100]))
        assert group.signals["judge"].tolist() == [1, 0]
        assert group.signals["judge_unparsable"].tolist() == [0, 1]
        assert [len(prompts) for prompts, _ in judge.asked] == [1]

    def test_a_chat_model_is_asked_as_one(self):
        judge = Scripted(lambda text, k: "")
        fetch(provider("judge", judge, max_new_tokens=8, chat=True), responses(["#9-2"]))
        assert "".join(map(chr, judge.asked[0][0][0].tokens)).startswith("<user>")

    def test_draws_change_with_the_weights_and_with_nothing_else(self):
        judge = Scripted(lambda text, k: "")
        for version in (0, 1, 1):
            fetch(provider("judge", judge, max_new_tokens=8), responses(["#9-2"], version=version))
        seeds = [sampling.seed for _, sampling in judge.asked]
        assert seeds[0] != seeds[1] == seeds[2]

    def test_without_verdicts_there_is_no_reward(self):
        with pytest.raises(MissingSignalError, match=r"self_verification.*'judge'"):
            get_reward("self_verification")().score(responses(["#9-2"]))


class TestCotrainedJudge:
    """Answers 7 three times, 1 twice and none once; verdicts as they are written."""

    TEXTS = ("#9-2", "#1", "#9-2", "nothing", "#1", "#9-2")
    SAID = ("TTF", "TFF", "FFF", "F.F", "TTT", "TTT")

    def taught(self, by, said=SAID, texts=TEXTS, context=10_000):
        judge = Scripted(lambda text, k: said[ord(text[0]) - ord("a")][k], context)
        texts = [f"{letter}{text}" for letter, text in zip("abcdef", texts, strict=False)]
        options = {"verdict": "whole", "yes": "T", "no": "F", "samples": 3, "temperature": 1.0, "max_new_tokens": 1}
        taught = provider("judge", judge, cotrain=by, template="{response}{question}", **options)
        return taught, fetch(taught, responses(texts))

    @staticmethod
    def seen(lessons):
        return [(lesson.group.prompt.id, lesson.rewards.tolist()) for lesson in lessons]

    def test_verdicts_are_paid_for_agreeing_with_the_vote_on_as_many_winners_as_others(self):
        taught, group = self.taught("vote")
        assert group.classes == [0, 1, 0, None, 1, 0]
        assert [each.prompt.id for each in group.beside] == [f"train/1#judge{k}" for k in range(6)]
        assert self.seen(taught.lessons(group)) == [
            ("train/1#judge0", [1, 1, 0]),
            ("train/1#judge1", [0, 1, 1]),
            ("train/1#judge2", [0, 0, 0]),
            ("train/1#judge3", [1, 0, 1]),  # what is no verdict agrees with nothing
            ("train/1#judge4", [0, 0, 0]),
            ("train/1#judge5", [1, 1, 1]),
        ]
        assert group.signals["judge"].tolist() == pytest.approx([2 / 3, 1 / 3, 0, 0, 1, 1])

    def test_or_with_a_check_the_first_of_each_kind(self):
        taught, group = self.taught("check")
        assert taught.needs == {"check"}
        group.signals["check"] = torch.tensor([1.0, 1, 1, 0, 1, 1])
        assert self.seen(taught.lessons(group)) == [("train/1#judge0", [1, 1, 0]), ("train/1#judge3", [1, 0, 1])]
        del group.signals["check"]
        with pytest.raises(MissingSignalError, match="'judge' needs the signal 'check'"):
            taught.lessons(group)

    @pytest.mark.parametrize("texts", [("nothing",) * 6, ("#9-2",) * 6])
    def test_nothing_is_taught_where_nobody_votes_or_all_agree(self, texts):
        taught, group = self.taught("vote", texts=texts)
        assert len(group.beside) == 6
        assert taught.lessons(group) == []

    def test_what_was_not_asked_about_is_not_taught(self):
        taught, group = self.taught("vote", texts=("#9-2", "#1", "#9-2", "nothing" * 9, "#1", "#9-2"), context=30)
        assert [lesson.group.prompt.id[-1] for lesson in taught.lessons(group)] == ["0", "1", "2", "4"]

    def test_a_judge_that_is_not_trained_keeps_nothing(self):
        taught, group = self.taught(None)
        assert (taught.teaches, taught.needs, group.beside, taught.lessons(group)) == (False, frozenset(), [], [])


class TestVotes:
    """`9,2` and its paraphrase `2,9`: the voters answer the prompt one way and the paraphrase another."""

    @staticmethod
    def say(text, k):
        return ("#9-2", "#9-2", "#2*9", "none")[k] if text.startswith("9") else ("#9+2", "#2+9", "#9-2", "#?")[k]

    def votes(self, voters, **options):
        return provider("votes", voters, samples=4, max_new_tokens=8, **options)

    def group(self, **kwargs):
        return responses(["#9-2", "#2+9", "no", "#9+2"], paraphrase_tokens=list(map(ord, "2,9=7:")), **kwargs)

    def test_the_paraphrases_majority_labels_the_prompt(self):
        group = fetch(self.votes(Scripted(self.say), of="paraphrase"), self.group())
        reward = get_reward("co_rewarding")()
        scores = reward.score(group)
        assert scores.tolist() == [0, 1, 0, 1]
        assert reward.counts([group], [scores]) == [{"no_winner": 0.0}]

    def test_a_teachers_majority_labels_the_prompt(self):
        group = fetch(self.votes(Scripted(self.say), of="prompt", weights="ema"), self.group())
        assert get_reward("co_rewarding")().score(group).tolist() == [1, 0, 0, 0]

    def test_voters_without_an_answer_pay_nobody(self):
        group = fetch(self.votes(Scripted(lambda text, k: "none"), of="paraphrase"), self.group())
        reward = get_reward("co_rewarding")()
        scores = reward.score(group)
        assert scores.tolist() == [0, 0, 0, 0]
        assert reward.counts([group], [scores]) == [{"no_winner": 1.0}]

    def test_offline_votes_are_taken_once(self):
        voters = Scripted(self.say)
        votes = self.votes(voters, of="prompt", weights="reference", offline=True)
        first, second = self.group(), self.group(version=5)
        fetch(votes, first)
        fetch(votes, second)
        assert len(voters.asked) == 1
        assert torch.equal(first.signals["cross_vote"], second.signals["cross_vote"])
        online = self.votes(voters, of="prompt", weights="reference")
        fetch(online, first)
        fetch(online, second)
        assert len(voters.asked) == 3

    def test_offline_votes_are_the_same_on_every_replica_and_after_a_resume(self, monkeypatch):
        """Servers draw other votes whenever they are asked: replicas' and a later life's answers are all different."""
        monkeypatch.setattr("megatron_urlvr.loop.signals.gather_from_leaders", lambda new, layout: layout.gather(new))
        cls = get_provider("votes")
        options = cls.Options(of="prompt", weights="servers", samples=1, max_new_tokens=8, offline=True)

        def life(says, voters, gather=lambda value: [value]):
            return Signals(
                layout=SimpleNamespace(world_size=1, is_leader=True, replica_ranks=(0,), gather=gather),
                policy=None, needs=frozenset({"cross_vote"}), providers={"other": (cls, options)}, seed=0,
                respondent_of=lambda *_: voters.setdefault(says, Scripted(lambda text, k: says)), own=None,
                grader_of=lambda prompt: CountdownGrader(), checkers_of=lambda prompt: {}, decode=str,
            )  # fmt: skip

        def labels(signals, *ids):
            groups = [self.group(id=id) for id in ids]
            signals.fetch(groups)
            return [group.signals["cross_vote"].tolist() for group in groups]

        def one_replica(rank, total, gather):
            says = ("#9-2", "#9+2")[rank]
            signals = life(says, voters := {}, gather)
            first = labels(signals, ("a", "b")[rank], "both")
            then = labels(signals, ("b", "a")[rank], "both")
            saved = json.loads(json.dumps(signals.state_dict()))
            return first, then, saved, sum(len(prompts) for prompts, _ in voters[says].asked)

        one, other = Replicas(2).run(one_replica)
        (first, then, saved, asked), (other_first, other_then, other_saved, other_asked) = one, other
        minus, plus = [1, 0, 0, 0], [0, 1, 0, 1]
        assert (first, other_first) == ([minus, minus], [plus, plus])
        assert (then, other_then) == ([plus, minus], [minus, minus])  # "both" is as the first replica drew it
        assert (asked, other_asked) == (2, 2)
        assert saved == other_saved
        resumed = life("#2*9", voters := {})
        resumed.load_state_dict(saved)
        assert labels(resumed, "a", "b", "both") == [minus, plus, minus]
        assert not voters["#2*9"].asked
        options.samples = 2  # then it is somebody else's memory
        stranger = life("#2*9", {})
        stranger.load_state_dict(saved)
        assert labels(stranger, "a") == [[0, 0, 0, 0]]

    def test_missing_paraphrases_are_counted_before_the_first_step(self):
        votes = self.votes(Scripted(self.say), of="paraphrase")
        assert list(votes.problems([self.group().prompt])) == []
        (problem,) = votes.problems([self.group().prompt, responses([]).prompt])
        assert "1 of 2 prompts have no paraphrase ('train/1' first)" in problem
        assert list(self.votes(Scripted(self.say), of="prompt", weights="ema").problems([responses([]).prompt])) == []

    @pytest.mark.parametrize(
        ("options", "sentence"),
        [
            ({"of": "prompt"}, "majority_vote with other draws"),
            ({"of": "paraphrase", "offline": True}, "offline needs weights that stay the same"),
        ],
    )
    def test_votes_that_would_be_something_else_are_refused(self, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            self.votes(Scripted(self.say), **options)


class TestTaskCheckers:
    TEXTS = ("#9-2", "#2-9", "#8-1", "#9+", "#?", "no", "#2+5")

    @pytest.mark.parametrize(
        ("checker", "expected"),
        [
            ("answer", [1, 0, 0, 0, 0, 0, 0]),
            ("numbers", [1, 1, 0, 0, 0, 0, 0]),
            ("value", [1, 0, 1, 0, 0, 0, 1]),
        ],
    )
    def test_countdown_is_checked_whole_or_by_halves(self, checker, expected):
        group = fetch(provider("checker", task=get_task("countdown", {}), checker=checker), responses(self.TEXTS))
        assert get_reward("program")().score(group).tolist() == expected

    def test_the_whole_is_both_halves(self):
        task = get_task("countdown", {})
        checks = task.checkers()
        for text in self.TEXTS:
            prompt = responses([text]).prompt
            both = checks["numbers"](prompt, text) and checks["value"](prompt, text)
            assert checks["answer"](prompt, text) == both

    def test_a_chains_steps_are_checked_without_its_label(self):
        task = get_task("chain_sum", {"digits": 4})
        # 1+2=3, 3+5=8, 8+2=0: a chain holds when every step follows from the one before and the answer ends it
        group = responses(["c380#0", "c380#1", "c390#0", "c38#8", "#0"], digits="1252")
        fetch(provider("checker", task=task, checker="steps"), group)
        assert group.signals["check"].tolist() == [1, 0, 0, 0, 0]

    def test_a_checker_that_is_not_there_is_a_sentence(self):
        prompt = responses([]).prompt
        (problem,) = provider("checker", task=get_task("countdown", {}), checker="steps").problems([prompt])
        assert problem == "checker = 'steps' is none of answer, numbers, value, the checkers of this task"
        (problem,) = provider("checker").problems([prompt])
        assert "these are from a file" in problem


def test_a_provider_outside_of_a_run_cannot_ask():
    cls = get_provider("judge")
    with pytest.raises(RuntimeError, match="without a context"):
        _ = cls(cls.Options(max_new_tokens=1)).context
