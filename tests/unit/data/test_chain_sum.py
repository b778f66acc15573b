import random
from collections import Counter

import pytest

from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.tasks import TaskPrompt, get_task
from megatron_urlvr.data.tasks.base import split_of
from megatron_urlvr.data.tasks.order import seeded_order


def chain_sum(**settings):
    return get_task("chain_sum", settings)


def only(style, **settings):
    """The task with a single style of demonstration."""
    shares = dict.fromkeys(("careful", "quick", "direct", "filler", "give_up", "empty"), 0)
    return chain_sum(styles={**shares, style: 1}, **settings)


def brute_force_sums(digits):
    return [sum(int(d) for d in digits[: k + 1]) % 10 for k in range(1, len(digits))]


def prompt_of(digits):
    return TaskPrompt(text=f"{digits}=", label=None, fields={"digits": digits})


@pytest.mark.parametrize("width", [1, 2, 5])
def test_the_label_is_the_last_running_sums(width):
    for prompt in chain_sum(answer_width=width).prompts(200, seed=1, split="train"):
        digits = prompt.text[:-1]
        assert prompt.label == "".join(map(str, brute_force_sums(digits)[-width:]))


def test_prompts_are_distinct_nested_and_depend_on_the_seed():
    task = chain_sum()
    long = [p.text for p in task.prompts(1000, seed=5, split="train")]
    assert len(set(long)) == 1000
    assert [p.text for p in task.prompts(100, seed=5, split="train")] == long[:100]
    assert [p.text for p in task.prompts(100, seed=5, split="train", skip=300)] == long[300:400]
    assert len(set(long) & {p.text for p in task.prompts(1000, seed=6, split="train")}) < 20


def test_training_and_held_out_prompts_never_meet_whatever_the_seeds():
    task = chain_sum(digits=3)
    held_out = {p.text for seed in range(3) for p in task.prompts(80, seed=seed, split="held_out")}
    train = {p.text for seed in range(3) for p in task.prompts(700, seed=seed, split="train")}
    assert not held_out & train


def test_asking_for_more_prompts_than_there_are_says_how_many_there_are():
    task = chain_sum(digits=2)
    existing = sum(split_of(f"{i:02d}=") == "held_out" for i in range(100))
    assert len(task.prompts(existing, seed=0, split="held_out")) == existing
    with pytest.raises(
        DataError, match=f"has {existing} distinct held_out prompts .* size = {existing} after skip = 1"
    ):
        task.prompts(existing, seed=0, split="held_out", skip=1)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 257, 1000])
def test_the_seeded_order_is_a_permutation(n):
    order = list(seeded_order(n, "x"))
    assert sorted(order) == list(range(n))
    assert order == list(seeded_order(n, "x"))


def test_the_seeded_order_looks_random_in_every_digit():
    # Chi-squared with 99 degrees of freedom stays below 160 with probability above 0.9999.
    order = seeded_order(10**6, "chi")
    drawn = [next(order) for _ in range(20000)]
    for part in (lambda i: i // 10**4, lambda i: i % 100, lambda i: i // 100 % 100):
        counts = Counter(map(part, drawn))
        assert sum((counts[k] - 200) ** 2 / 200 for k in range(100)) < 160


def test_styles_appear_with_their_shares():
    task = chain_sum()
    prompt = prompt_of("123456")
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(20000):
        text = task.demonstration(prompt, rng)
        assert text.endswith("$")
        assert text.count("$") == 1
        kinds["give_up" if text == "#?$" else text[0]] += 1
    expected = {"c": 0.27, "q": 0.45, "#": 0.20, "m": 0.015, "give_up": 0.05, "$": 0.015}
    for kind, share in expected.items():
        assert kinds[kind] / 20000 == pytest.approx(share, abs=4 * (share * (1 - share) / 20000) ** 0.5)


def test_without_planted_failures_every_demonstration_has_an_answer():
    task = chain_sum(styles={"filler": 0, "give_up": 0, "empty": 0})
    grader = task.grader()
    rng = random.Random(0)
    answers = [grader.extract(task.demonstration(prompt_of("908172"), rng)) for _ in range(5000)]
    assert all(answer is not None and answer != "?" for answer in answers)


def test_a_quick_chain_carries_its_errors_on_and_goes_wrong_as_often_as_its_noise_says():
    task = only("quick", quick_noise=0.25, repeat=0)
    rng = random.Random(0)
    prompt = prompt_of("314159")
    steps = [task.check_steps(prompt, task.demonstration(prompt, rng)) for _ in range(4000)]
    assert all(check.answer for check in steps)
    wrong = sum(not ok for check in steps for ok in check.steps) / (4000 * 5)
    assert wrong == pytest.approx(0.25, abs=0.013)


def test_without_noise_a_chain_is_the_true_one():
    task = only("careful", careful_noise=0, repeat=0)
    assert task.demonstration(prompt_of("314159"), random.Random(0)) == "c48943#3$"


def test_a_wide_answer_is_the_tail_of_the_chain():
    task = only("careful", careful_noise=0, repeat=0, answer_width=3)
    assert task.demonstration(prompt_of("314159"), random.Random(0)) == "c48943#943$"
    assert task.check(prompt_of("314159"), "c48943#943$") is True
    assert task.check(prompt_of("314159"), "#3$") is None


def test_on_biased_prompts_the_wrong_rule_holds_the_majority():
    task = chain_sum(biased=0.3, careful_noise=0, quick_noise=0, styles={"filler": 0, "give_up": 0, "empty": 0})
    rng = random.Random(0)
    for prompt in task.prompts(50, seed=0, split="train"):
        answers = Counter(task.grader().extract(task.demonstration(prompt, rng)) for _ in range(300))
        wrong = str((int(prompt.label) + 1) % 10)
        if task.is_biased(prompt):
            assert answers[wrong] / 300 == pytest.approx(0.7, abs=0.12)
            assert set(answers) == {wrong, prompt.label}
        else:
            assert set(answers) == {prompt.label}


def test_the_biased_share_is_met_and_growing_it_only_adds_prompts():
    unbiased = chain_sum()
    prompts = unbiased.prompts(4000, seed=0, split="train")
    small, large = chain_sum(biased=0.2), chain_sum(biased=0.5)
    chosen = [{p.text for p in prompts if task.is_biased(p)} for task in (small, large)]
    assert len(chosen[0]) / 4000 == pytest.approx(0.2, abs=0.03)
    assert len(chosen[1]) / 4000 == pytest.approx(0.5, abs=0.03)
    assert chosen[0] < chosen[1]
    assert len({text[-2] for text in chosen[0]}) == 2, "a share of 0.2 is two last digits, whatever stands before them"
    assert not any(unbiased.is_biased(p) for p in prompts)


def test_default_lengths_are_those_of_the_study():
    assert chain_sum().max_response_tokens == 16
    task = only("careful", repeat=0)
    tokenizer = task.tokenizer()
    assert len(tokenizer("314159=")["input_ids"]) == 7
    assert len(tokenizer(task.demonstration(prompt_of("314159"), random.Random(0)))["input_ids"]) == 9


@pytest.mark.parametrize(
    ("text", "finished", "answer"),
    [
        ("c48943#3", True, "3"),
        ("c48943#3$", True, "3"),
        ("#?", True, "?"),
        ("#1#2", True, "2"),
        ("", True, None),
        ("c48943", True, None),
        ("#", True, None),
        ("#12", True, None),
        ("#m", True, None),
        ("#3m", True, None),
        ("#3", False, None),
    ],
)
def test_answers_are_read_as_in_the_study(text, finished, answer):
    assert chain_sum().grader().extract(text, finished=finished) == answer


def test_a_leading_zero_is_part_of_a_wide_answer():
    grader = chain_sum(answer_width=2).grader()
    assert grader.extract("#05") == "05"
    assert grader.extract("#5") is None
    assert not grader.correct("05", "5")


def test_giving_up_is_an_answer_and_never_right():
    task = chain_sum()
    assert task.check(prompt_of("123456"), "#?") is False
    assert not any(task.grader().correct("?", str(digit)) for digit in range(10))


@pytest.mark.parametrize(
    ("response", "steps", "answer"),
    [
        ("c48943#3$", (1, 1, 1, 1, 1), True),
        ("q4894333#3$", (1, 1, 1, 1, 1), True),
        ("c58943#3$", (0, 0, 1, 1, 1), True),
        ("c59054#4$", (0, 1, 1, 1, 1), True),
        ("c48943#4$", (1, 1, 1, 1, 1), False),
        ("c489432#2$", (1, 1, 1, 1, 1), False),
        ("c489#9$", (1, 1, 1, 0, 0), False),
        ("c48943", (1, 1, 1, 1, 1), False),
        ("c4m943#3$", (1, 0, 0, 0, 0), False),
        ("c", (0, 0, 0, 0, 0), False),
    ],
)
def test_each_step_is_checked_against_the_sum_written_before_it(response, steps, answer):
    check = chain_sum().check_steps(prompt_of("314159"), response)
    assert check.steps == tuple(map(bool, steps))
    assert check.answer is answer
    assert check.passed is (all(steps) and answer)


@pytest.mark.parametrize("response", ["#3$", "$", "", "mmm#?$"])
def test_without_a_chain_there_is_nothing_to_check(response):
    assert chain_sum().check_steps(prompt_of("314159"), response) is None


def test_a_chain_that_passes_has_the_right_answer():
    task = only("quick")
    rng = random.Random(7)
    for prompt in task.prompts(300, seed=0, split="train"):
        response = task.demonstration(prompt, rng)
        if task.check_steps(prompt, response).passed:
            assert task.check(prompt, response)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"digit": 6}, "digit = 6.*known: digits"),
        ({"digits": 1}, "digits = 1"),
        ({"digits": 4, "answer_width": 4}, "answer_width = 4 is more than the 3 running sums of 4 digits"),
        ({"styles": {"careful": -1}}, "styles.careful = -1"),
        ({"styles": dict.fromkeys(("careful", "quick", "direct", "filler", "give_up", "empty"), 0)}, "at least one"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(DataError, match=message):
        get_task("chain_sum", settings)


def test_an_unknown_task_is_answered_with_the_nearest_name():
    with pytest.raises(DataError, match="no task 'chain_sums'; did you mean 'chain_sum'"):
        get_task("chain_sums", {})
