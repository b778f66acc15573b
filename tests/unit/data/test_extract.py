import re

import pytest

from megatron_urlvr.data.grading.extract import last_boxed, last_hash, last_match


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\{1}", r"\{1"),
        (r"\boxed{a\\}", r"a\\"),
        (r"\boxed{\boxed{5}}", "5"),
        (r"\fbox{7}", "7"),
        (r"\boxed {8}", "8"),
        (r"\boxed 9 and so on", "9"),
        (r"$\boxed 9$", "9"),
        (r"\boxed{}", ""),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed{{}", None),
        (r"\boxedx{3}", None),
        ("nothing", None),
        ("", None),
    ],
)
def test_the_last_box_with_its_braces_balanced(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "finished", "answer"),
    [
        ("#### 42", True, "42"),
        ("#1 #2", True, "2"),
        ("#### 42\nQuestion: next", True, "42"),
        ("#### 42\nQuestion", False, "42"),
        ("#### 42", False, None),
        ("no mark", True, None),
        ("#", True, ""),
    ],
)
def test_the_last_hash_up_to_the_end_of_its_line(text, finished, answer):
    assert last_hash(text, finished=finished) == answer


def test_the_last_match_unless_it_was_cut_off():
    pattern = re.compile(r"answer is (\d+)")
    text = "the answer is 1, no: the answer is 23"
    assert last_match(text, pattern, finished=True) == "23"
    assert last_match(text, pattern, finished=False) == "1"
    assert last_match(text + ".", pattern, finished=False) == "23"
    assert last_match("none", pattern, finished=True) is None
