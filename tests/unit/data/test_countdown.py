import random
from collections import Counter
from fractions import Fraction
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.tasks import TaskPrompt, get_task
from megatron_urlvr.data.tasks.arithmetic import parse
from megatron_urlvr.data.tasks.countdown import CountdownStyles

PROMPT = TaskPrompt(text="25,7,3=46:", label="25+7*3", fields={"numbers": (25, 7, 3), "target": 46})


def countdown(**options):
    return get_task("countdown", options)


def only(style):
    """The task with a single style of demonstration."""
    shares = dict.fromkeys(CountdownStyles.model_fields, 0)
    return countdown(styles={**shares, style: 1})


def reachable(numbers, target):
    """Brute force, another way round than the task: join any two, keep all exact values."""
    if len(numbers) == 1:
        return numbers[0] == target
    for a, b, *rest in permutations(numbers):
        values = [a + b, a - b, a * b, *([Fraction(a) / b] if b else [])]
        if any(reachable((value, *rest), target) for value in values):
            return True
    return False


@pytest.mark.parametrize("counts", [[3], [4], [3, 4]])
def test_every_prompt_can_be_solved(counts):
    task = countdown(counts=counts)
    for prompt in task.prompts(25, seed=0, split="train"):
        numbers, target = prompt.fields["numbers"], prompt.fields["target"]
        assert len(numbers) in counts
        assert prompt.text == f"{','.join(map(str, numbers))}={target}:"
        assert reachable(tuple(map(Fraction, numbers)), target)
        assert task.check(prompt, f"#{prompt.label}")
        assert "label" not in prompt.fields


def test_prompts_are_distinct_nested_and_split_by_text():
    task = countdown(counts=[3], max_number=9)
    long = [p.text for p in task.prompts(300, seed=1, split="train")]
    assert len(set(long)) == 300
    assert [p.text for p in task.prompts(50, seed=1, split="train", skip=100)] == long[100:150]
    assert not set(long) & {p.text for p in task.prompts(100, seed=2, split="held_out")}


def test_a_task_that_is_exhausted_says_so():
    with pytest.raises(DataError, match="distinct held_out prompts"):
        countdown(counts=[3], max_number=2, max_target=4).prompts(100, seed=0, split="held_out")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("25+7*3", True),
        (" 3 * 7 + 25 ", True),
        ("((25))+(7*3)", True),
        ("25+7+3", False),
        ("46", False),
        ("25+21", False),
        ("25+7*3+3-3", False),
        ("25+7*3*1", False),
        ("?", False),
        ("25+7*3=46", None),
        ("25+7**3", None),
        ("25//7+3", None),
        ("-25+7*3", False),
        ("-(-25)+7*3", True),
        ("+7*-3*-1", False),
        ("7*-(-3)+25", True),
        ("-(-25-7*3)", True),
        ("--25+7*3", True),
        ("25-+-7*3", True),
        ("25~7*3", None),
        ("not 25+7*3", None),
        ("25+7*", None),
        ("25+07*3", None),
        ("2_5+7*3", None),
        ("25+7*x", None),
        ("__import__('os').system('ls')", None),
        ("(lambda: 46)()", None),
        ("25.0+7*3", None),
        ("25, 7*3", None),
        ("25 if 7 else 3", None),
        ("25 7", None),
        ("", None),
        ("25/(7-7)+3", False),
    ],
)
def test_an_answer_uses_each_number_exactly_once_and_nothing_but_arithmetic(answer, right):
    task = countdown()
    assert task.check(PROMPT, f"25-7=18;#{answer}") is right
    extracted = task.grader().extract(f"#{answer}")
    assert (extracted is None) is (right is None)
    assert task.grader().correct(extracted, PROMPT.label) is bool(right)


def test_division_is_exact():
    prompt = TaskPrompt(text="8,3,3=8:", label="8/3*3", fields={"numbers": (8, 3, 3), "target": 8})
    assert countdown().check(prompt, "#8/3*3") is True
    near = TaskPrompt(text="", label=None, fields={"numbers": (10, 3, 3), "target": 1})
    assert countdown().check(near, "#10/3/3") is False


@pytest.mark.parametrize(
    "text",
    [
        "(" * 150 + "1" + ")" * 150,
        "1" + "+1" * 5000,
        "9" * 150,
        "9*9*" * 60,
        "(" * 199,
        "1-" * 99 + "1",
        "9" * 10,
        "(-" * 99 + "1",
        "(-" * 60 + "1" + ")" * 60 + "-" * 19 + "1",
        "-(1-" * 39 + "1" + ")" * 39 + "*1",
    ],
)
def test_hostile_text_is_refused_or_harmless(text):
    expression = parse(text)
    assert expression is None or expression.value == eval(text)


expressions = st.recursive(
    st.integers(0, 99).map(str),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
        st.tuples(st.sampled_from("+-"), inner).map("".join),
    ),
    max_leaves=6,
)


@given(expressions)
@settings(max_examples=300, deadline=None)
def test_the_canonical_form_keeps_value_and_numbers_and_is_its_own_canonical_form(text):
    first = parse(text)
    again = parse(first.canonical)
    assert again.canonical == first.canonical
    assert again.numbers == first.numbers
    if first.value is not None and again.value is not None:
        assert again.value == first.value


@given(expressions)
@settings(max_examples=300, deadline=None)
def test_values_are_those_of_exact_python_arithmetic(text):
    value = parse(text).value
    namespace = {f"n{i}": Fraction(i) for i in range(100)}
    exact = "".join(f"n{token}" if token.isdigit() else token for token in _tokens(text))
    try:
        expected = eval(exact, {"__builtins__": {}}, namespace)
    except ZeroDivisionError:
        expected = None
    assert value == expected


def _tokens(text):
    number = ""
    for character in text:
        if character.isdigit():
            number += character
            continue
        if number:
            yield number
            number = ""
        yield character
    if number:
        yield number


def test_orders_of_operands_and_brackets_are_one_answer_and_other_expressions_are_not():
    grader = countdown().grader()
    answers = [grader.extract(f"#{text}") for text in ("25+7*3", "3*7+25", "(25)+(7*3)", "25+7+3", "7*3-25", "x")]
    assert grader.classes(answers) == [0, 0, 0, 3, 4, None]


def test_a_response_that_was_cut_off_has_no_answer():
    grader = countdown().grader()
    assert grader.extract("#25+7*3", finished=False) is None


def test_demonstrations_fit_the_limit_and_attempts_state_true_values():
    task = countdown()
    tokenizer = task.tokenizer()
    rng = random.Random(0)
    for prompt in task.prompts(1500, seed=0, split="train"):
        text = task.demonstration(prompt, rng)
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) <= task.max_response_tokens
        assert ids[-1] == tokenizer.eos_token_id
        for attempt in filter(None, text.partition("#")[0].split(";")):
            expression, _, value = attempt.partition("=")
            assert parse(expression).value == int(value)


@pytest.mark.parametrize(
    ("style", "verdicts"),
    [
        ("search", {True}),
        ("direct", {True}),
        ("wrong_target", {False}),
        ("wrong_number", {False, True}),
        ("malformed", {None}),
        ("give_up", {False}),
        ("copied", {False}),
    ],
)
def test_each_style_is_as_right_as_its_name(style, verdicts):
    task = only(style)
    rng = random.Random(0)
    seen = Counter(task.check(p, task.demonstration(p, rng)) for p in task.prompts(200, seed=0, split="train"))
    assert set(seen) <= verdicts
    if style == "wrong_number":
        assert seen[False] > 150


def test_who_copies_the_target_has_its_value_and_not_the_numbers():
    task = only("copied")
    rng = random.Random(0)
    for prompt in task.prompts(50, seed=0, split="train"):
        response = task.demonstration(prompt, rng)
        assert task.checkers()["value"](prompt, response)
        assert not task.checkers()["numbers"](prompt, response)


def test_solutions_and_attempts_keep_to_the_operations_allowed():
    task = countdown(counts=[3], operations=["+", "-"], attempts=1)
    rng = random.Random(0)
    prompts = task.prompts(200, seed=0, split="train")
    attempts = [task.demonstration(prompt, rng).partition("#")[0] for prompt in prompts]
    assert not set("*/") & set("".join([*attempts, *(prompt.label for prompt in prompts)]))
    assert max(text.count(";") for text in attempts) == 1


def test_judgements_are_of_right_and_wrong_responses_alike_and_say_which_is_which():
    task = countdown(judgements={"share": 0.5})
    rng = random.Random(0)
    said, demonstrations = Counter(), 0
    for prompt in task.prompts(600, seed=0, split="train"):
        text, written = task.example(prompt, rng)
        verdict = task.verdict(written)
        if text == prompt.text:
            demonstrations += 1
            continue
        response = text.removeprefix(prompt.text).removesuffix("@")
        assert task.judge_text(prompt, response) == text
        assert verdict is bool(task.check(prompt, response))
        said[verdict] += 1
    assert 250 < demonstrations < 350
    assert 0.4 < said[True] / said.total() < 0.6


def test_verdicts_are_as_often_true_as_asked_for():
    task = countdown(judgements={"share": 1, "accuracy": 0.8})
    rng = random.Random(0)
    agree = 0
    for prompt in task.prompts(1000, seed=0, split="train"):
        text, written = task.example(prompt, rng)
        agree += task.verdict(written) is bool(task.check(prompt, text.removeprefix(prompt.text).removesuffix("@")))
    assert 0.75 < agree / 1000 < 0.85


def test_without_judgements_examples_are_the_demonstrations():
    task = countdown()
    prompts = task.prompts(50, seed=0, split="train")
    examples, demonstrations = random.Random(3), random.Random(3)
    assert [task.example(p, examples) for p in prompts] == [
        (p.text, task.demonstration(p, demonstrations)) for p in prompts
    ]


@pytest.mark.parametrize(("text", "verdict"), [("T", True), (" F", False), ("T$", True), ("TF", None), ("", None)])
def test_a_verdict_is_one_letter(text, verdict):
    assert countdown().verdict(text) is verdict


def test_a_demonstration_needs_the_solution():
    with pytest.raises(ValueError, match="has no label"):
        countdown().demonstration(TaskPrompt(text="x", label=None, fields=PROMPT.fields), random.Random(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": [5]}, r"counts\.0"),
        ({"counts": []}, "counts"),
        ({"max_number": 100}, "max_number = 100"),
        ({"operations": ["/"]}, "hardly ever leaves an integer"),
    ],
)
def test_wrong_settings_are_named(options, message):
    with pytest.raises(DataError, match=message):
        countdown(**options)
