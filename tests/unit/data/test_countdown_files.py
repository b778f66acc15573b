"""Files of Countdown problems, with the columns that the public data sets have."""

import json
import random
import re

import pytest

from megatron_urlvr.config.data import JsonlSource
from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.labels import LabelStore
from megatron_urlvr.data.sources import load_source
from megatron_urlvr.data.tokenizer import character_tokenizer

ROWS = [{"target": 46, "nums": [25, 7, 3]}, {"target": 98, "nums": [44, 19, 35]}]


def load(path, labels=None, **settings):
    return load_source(
        JsonlSource(path=str(path), **{"countdown": {}, **settings}),
        name="set",
        tokenizer=character_tokenizer("".join(map(chr, range(32, 127))), eos="~"),
        labels=LabelStore() if labels is None else labels,
        split="train",
        seed=0,
        max_prompt_tokens=200,
        overlong="refuse",
    )


@pytest.fixture(params=["jsonl", "parquet"])
def file(request, tmp_path):
    path = tmp_path / f"problems.{request.param}"
    if request.param == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").Table.from_pylist(ROWS), path)
    else:
        path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_a_row_becomes_a_question_in_words_that_checkers_can_read(file):
    labels = LabelStore()
    loaded = load(file, labels, plain_template="{prompt} Answer:")
    first = loaded.prompts[0]
    assert first.text.startswith("Combine the numbers 25, 7, 3 ")
    assert "the result is 46. " in first.text
    assert first.text.endswith("Answer:")
    assert (first.fields["numbers"], first.fields["target"]) == ((25, 7, 3), 46)
    assert loaded.unlabelled == 0
    label = labels.get(first.id, use="audit")
    for text, right in (("25+7*3", True), ("3 \\times 7 + 25", True), ("(25 + 7) * 3", False), ("46", False)):
        response = f"I try. \\boxed{{{text}}}"
        assert loaded.grader.correct(loaded.grader.extract(response), label) is right
        assert loaded.checkers["answer"](first, response) is right
    assert loaded.checkers["numbers"](first, "\\boxed{(25 + 7) * 3}")
    assert loaded.checkers["value"](first, "\\boxed{46}")


def test_answers_are_one_when_their_expressions_are(file):
    grader = load(file).grader
    texts = ("25+7*3", "$7 \\cdot 3+25$", "25+7+3", "46 = 25+7*3", "nothing", "25-(-7)*3")
    answers = [grader.extract(f"\\boxed{{{text}}}") for text in texts]
    assert grader.classes(answers) == [0, 0, 2, None, None, 0]
    assert grader.locate("so \\boxed{25+7*3}.") == (10, 16)
    assert grader.locate("so \\boxed{25+}.") is None


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"\frac{6}{2}+1", "6/2+1"),
        (r"\dfrac{6}{2} + 1", "6/2+1"),
        (r"1+\frac62", "6/2+1"),
        (r"\frac{\frac{12}{2}}{1+2} \times 5", "12/2/(1+2)*5"),
        (r"\left(\tfrac{6 - 4}{2}\right) \div -3", "(6-4)/2/-3"),
        (r"2\frac{1}{2}", None),  # a mixed number is none of the operations
        (r"\frac{6}", None),
        (r"\fraction{6}{2}", None),
        (r"\frac{" * 20_000, None),
    ],
)
def test_fractions_are_divisions(file, written, meant):
    grader = load(file).grader
    assert grader.extract(f"\\boxed{{{written}}}") == (None if meant is None else grader.extract(f"\\boxed{{{meant}}}"))
    assert (grader.extract(f"\\boxed{{{written}}}") is None) is (meant is None)


def tinyzero(answer, numbers, target):
    """Whether TinyZero's scorer gives its full point, written from its rule: its digits are the numbers, its value, by
    Python and within 1e-5, the target."""
    if sorted(map(int, re.findall(r"\d+", answer))) != sorted(numbers) or not re.match(r"^[\d+\-*/().\s]+$", answer):
        return False
    try:
        value = eval(answer, {"__builtins__": None}, {})
        return abs(value - target) < 1e-5
    except (SyntaxError, TypeError, ZeroDivisionError):
        return False


def answers_with_signs(rng, count):
    """Random expressions of three numbers with signs and parentheses everywhere, some of them broken: the numbers, the
    text, its value, or 1 where it has none."""
    for _ in range(count):
        numbers = [rng.randint(1, 9) for _ in range(3)]
        text = ""
        for k, number in enumerate(numbers):
            sign, bracket, inner = rng.choice(["", "", "-", "+", "--"]), rng.choice(["", "", "("]), rng.choice("- ")
            text += f"{rng.choice('+-*/') if k else ''}{sign}{bracket}{inner}{number}" + (
                ")" if rng.random() < 0.3 else ""
            )
        text += ")" * (text.count("(") - text.count(")"))
        try:
            yield numbers, text, round(eval(text.strip()))
        except (SyntaxError, ZeroDivisionError, TypeError):
            yield numbers, text, 1


def test_right_and_wrong_are_those_of_tinyzeros_scorer(file):
    grader, agreed = load(file).grader, {True: 0, False: 0}
    for numbers, answer, target in answers_with_signs(random.Random(0), 2000):
        right = grader.correct(grader.extract(f"\\boxed{{{answer}}}"), f"{','.join(map(str, numbers))}={target}")
        assert right is tinyzero(answer.strip(), numbers, target), answer
        agreed[right] += 1
    assert min(agreed.values()) > 300
    assert grader.correct(grader.extract(r"\boxed{-3+10}"), "3,10=7")


def test_the_answer_is_where_grading_says(file):
    grader = load(file, grading={"extract": "regex", "pattern": "<answer>(.*?)</answer>"}).grader
    assert grader.extract("<answer>3*7+25</answer> ") == grader.extract("<answer> 25 + 7*3 </answer> ")


def test_a_base_of_the_task_can_be_asked_in_its_own_words(file):
    columns = {"question": "{numbers}={target}:", "separator": ","}
    loaded = load(file, countdown=columns, grading={"extract": "hash"})
    assert [prompt.text for prompt in loaded.prompts] == ["25,7,3=46:", "44,19,35=98:"]
    assert loaded.checkers["answer"](loaded.prompts[1], "44-35=9;#44+19+35")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"target": 46}, "line 1 has None under 'nums'"),
        ({"target": 46, "nums": [25, -7]}, r"line 1 has \[25, -7\] under 'nums'; a list of whole numbers"),
        ({"target": "46", "nums": [25, 7]}, "line 1 has '46' under 'target'; a whole number"),
    ],
)
def test_rows_that_are_no_problem_are_named(row, sentence, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError, match=sentence):
        load(path)


def test_a_question_without_the_numbers_is_refused():
    with pytest.raises(ValueError, match=r"placeholder \{numbers\}"):
        JsonlSource(path="x", countdown={"question": "reach {target}"})
