import textwrap
from itertools import combinations

import pytest

from megatron_urlvr.config.data import GradingSection
from megatron_urlvr.data.grading.pool import MathPool, PoolError
from megatron_urlvr.data.grading.text import TextGrader

# Stands in for math-verify: equal when the texts agree after "|"; can crash, fail, or hang so that only a kill ends it.
WORKER = textwrap.dedent(
    """
    import json, os, signal, sys
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        a, b = json.loads(line)
        with open(os.environ["ASKED"], "a") as log:
            log.write(f"{a} {b}\\n")
        if "hang" in a + b:
            signal.pthread_sigmask(signal.SIG_BLOCK, set(range(1, 32)))
            signal.pause()
        if "crash" in a + b:
            os._exit(1)
        fails = "fail" in a + b
        print(json.dumps({"error": "E"} if fails else {"equal": a.split("|")[-1] == b.split("|")[-1]}), flush=True)
    """
)


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """Which pairs reached a comparison process."""
    path = tmp_path / "asked"
    path.touch()
    monkeypatch.setenv("ASKED", str(path))
    return lambda: path.read_text().splitlines()


@pytest.fixture
def grader(tmp_path, asked):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    pool = MathPool(timeout_s=60, size=2, script=script)
    grader = TextGrader(GradingSection(), pool=pool)
    grader.pool = pool
    yield grader
    grader.close()


@pytest.fixture(scope="module")
def real():
    """math-verify itself, with a limit that a busy machine does not reach."""
    grader = TextGrader(GradingSection(timeout_s=60))
    yield grader
    grader.close()


def test_exact_grading_never_starts_a_process():
    grader = TextGrader(GradingSection(equivalence="exact"))
    assert grader.equivalent("1,000", "1000")
    assert not grader.equivalent(r"\sqrt{8}", r"2\sqrt{2}")
    assert grader.classes(["1/2", r"\frac12", "0.5", None]) == [0, 0, 2, None]
    assert not grader.counts


def test_plain_numbers_and_words_are_decided_without_a_process(grader, asked):
    assert grader.equivalent("0.5", r"\frac{1}{2}")
    assert not grader.equivalent("3", "4")
    assert not grader.equivalent("dog", "god")
    assert grader.equivalent("Yes", r"\text{yes}")
    assert asked() == []


def test_each_pair_is_compared_once_whatever_its_order(grader, asked):
    assert grader.equivalent("2a|z", "2b|z")
    assert grader.equivalent("2b|z", "2a|z")
    assert grader.equivalent("$2b|z$", " 2a|z")
    assert len(asked()) == 1
    assert grader.counts == {"asked": 3, "decided": 3}


def test_classes_compare_distinct_strings_only(grader, asked):
    answers = ["1a|x", "1b|x", "1c|y"] * 50 + [None]
    assert grader.classes(answers) == [0, 0, 2] * 50 + [None]
    assert len(asked()) == 2


def test_classes_agree_with_a_comparison_of_all_pairs(grader):
    answers = [f"{i}k|{'xyz'[i * i % 3]}" for i in range(12)] + [None, "7", "7.0"]
    classes = grader.classes(answers)
    for i, j in combinations(range(len(answers)), 2):
        if answers[i] is None or answers[j] is None:
            continue
        assert (classes[i] == classes[j]) is grader.equivalent(answers[i], answers[j])
    assert all(c is None or classes[c] == c for c in classes)


def test_groups_graded_side_by_side_get_what_they_get_alone(grader):
    groups = [[f"{i}a|{i % 3}", f"{i}b|{j % 2}", None] for i in range(8) for j in range(3)]
    assert grader.classes_of(groups) == [grader.classes(group) for group in groups]


def test_a_comparison_that_hangs_is_killed_counted_and_never_repeated(grader, asked):
    grader.pool.timeout_s = 0.2
    assert not grader.equivalent("1hang", "1b")
    assert not grader.equivalent("1hang", "1b")
    grader.pool.timeout_s = 60
    assert grader.counts == {"asked": 2, "timeouts": 2}
    assert grader.equivalent("1a|x", "1b|x")
    assert len(asked()) == 2


def test_a_process_that_dies_and_one_that_fails_count_as_different(grader):
    assert not grader.equivalent("1crash", "1b")
    assert not grader.equivalent("1fail", "1b")
    assert grader.equivalent("1a|x", "1b|x")
    assert grader.counts == {"asked": 3, "crashes": 1, "errors": 1, "decided": 1}


def test_what_was_counted_is_handed_over_once_and_does_not_depend_on_what_is_remembered(grader):
    first, second = [], []
    for found in (first, second):
        for other in ("1a|y", "1crash", "1fail"):
            grader.equivalent("1a|x", other)
        found.append(grader.counted())
    assert first == second
    (counted,) = first
    none = {"grading/timeouts": 0, "grading/too_long": 0}
    assert counted == {"grading/asked": 3, "grading/crashes": 1, "grading/errors": 1, **none}
    assert grader.counted() == dict.fromkeys(counted, 0)
    assert TextGrader(GradingSection(equivalence="exact")).counted() == {}


def test_very_long_answers_are_only_compared_as_strings(grader, asked):
    assert not grader.equivalent("1+" * 200 + "1", "2+" * 200 + "1")
    assert grader.counts == {"asked": 1, "too_long": 1}
    assert asked() == []


def test_closing_ends_the_processes_and_a_later_comparison_starts_new_ones(grader):
    assert grader.equivalent("1a|x", "1b|x")
    grader.close()
    assert grader.equivalent("1c|x", "1d|x")


def test_a_process_that_cannot_start_is_a_sentence(tmp_path):
    script = tmp_path / "broken.py"
    script.write_text("raise SystemExit(3)")
    with pytest.raises(PoolError, match=r"did not start .*exit code 3.*grading\.equivalence to exact"):
        MathPool(timeout_s=1, script=script).compare("a", "b")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\sqrt{8}", r"2\sqrt{2}", True),
        ("x^2+2x+1", "(x+1)^2", True),
        (r"1\frac12", "3/2", True),
        ("1 1/2", "1.5", True),
        ("1 1/2", "1", False),
        (r"5\text{ cm}", "5", True),
        ("(1,2)", "(2,1)", False),
        (r"\{1,2\}", r"\{2,1\}", True),
        ("[1,2]", "[1,2)", False),
        ("3", "1,3", False),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        (r"2\pi", r"\pi\cdot 2", True),
        (r"\frac{", "1", False),
    ],
)
def test_math_verify_decides_what_spelling_cannot(real, a, b, same):
    assert real.equivalent(a, b) is same
    assert real.equivalent(b, a) is same


def test_math_verify_hanging_in_compiled_code_is_ended():
    grader = TextGrader(GradingSection(timeout_s=1))
    try:
        assert not grader.equivalent("9^{9^{9^{9}}}", r"\sqrt{2}")
        assert grader.counts == {"asked": 1, "timeouts": 1}
    finally:
        grader.close()


def test_answers_are_extracted_normalised_and_never_empty():
    boxed = TextGrader(GradingSection(equivalence="exact"))
    assert boxed.extract(r"so \boxed{\dfrac12}.") == r"\frac{1}{2}"
    assert boxed.extract(r"so \boxed{\dfrac12}", finished=False) == r"\frac{1}{2}"
    assert boxed.extract(r"\boxed{ }") is None
    assert boxed.extract("12") is None
    hashed = TextGrader(GradingSection(extract="hash", equivalence="exact"))
    assert hashed.extract("#### 1,234") == "1234"
    assert hashed.extract("#### 1,2", finished=False) is None
    pattern = TextGrader(GradingSection(extract="regex", pattern=r"is (\S+)", equivalence="exact"))
    assert pattern.extract("it is 07.") == "7"


@pytest.mark.parametrize(
    ("extract", "written", "label"),
    [
        ("boxed", "42", "42"),
        ("boxed", r"We get \boxed{\dfrac12}.", r"\frac{1}{2}"),
        ("hash", "3 + 4 = 7\n#### 7", "7"),
        ("hash", "7.0", "7"),
    ],
)
def test_a_label_may_be_bare_or_at_the_end_of_a_solution(extract, written, label):
    assert TextGrader(GradingSection(extract=extract, equivalence="exact")).label(written) == label


def test_no_answer_is_never_right():
    grader = TextGrader(GradingSection(equivalence="exact"))
    assert not grader.correct(None, "1")
    assert grader.correct("1", "1.0")
