import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.data.grading.normalise import as_fraction, is_words, normalise


@pytest.mark.parametrize(
    "spellings",
    [
        [
            "42",
            " 42 ",
            "42.",
            "$42$",
            "$$42$$",
            r"\(42\)",
            r"\[42\]",
            "{42}",
            "042",
            "+42",
            "42.0",
            r"\text{42}",
            "x=42",
        ],
        ["1000", "1,000", "1{,}000", r"1\,000", r"\$1,000.00", "$1,000", "1,\\!000"],
        [r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac1{2}", r"\frac{1}2", "1/2", r"\displaystyle\frac{1}{2}"],
        [r"1\frac{1}{2}", "1 1/2", r"1 \frac{1}{2}", r"1\dfrac12"],
        ["(1,2)", "(1, 2)", r"\left(1, 2\right)", r"\left( 1,\,2 \right)", r"\big(1,2\big)"],
        [r"\{1,2\}", r"\left\{1, 2\right\}"],
        ["30", r"30^\circ", r"30^{\circ}", "30°", r"30\%", "30%"],
        ["-5", "\u22125", "- 5"],
        ["0", "-0", "0.0", "00", ".0"],
        ["0.5", ".5", "0.50"],
        [r"\sqrt{3}", r"\sqrt3"],
        ["no solution", r"\text{no solution}", r"\text{ no  solution }"],
        ["B", "(B)", r"\text{(B)}", r"\textbf{B}", "B."],
        ["2x+1", "2x + 1", "y = 2x+1"],
    ],
)
def test_spellings_of_one_answer_become_one(spellings):
    assert {normalise(spelling) for spelling in spellings} == {spellings[0]}


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("1 000", "1 000"),
        ("12,34", "12,34"),
        ("1,2,3", "1,2,3"),
        ("(1,234)", "(1,234)"),
        ("5!", "5!"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\sqrt32", r"\sqrt32"),
        ("101_2", "101_2"),
        ("{1}{2}", "{1}{2}"),
        ("1e5", "1e5"),
        ("x==5", "x==5"),
        ("--5", "--5"),
    ],
)
def test_what_would_change_its_meaning_is_left_alone(answer, kept):
    assert normalise(answer) == kept


@pytest.mark.parametrize("answer", ["", " ", "...", "$", r"\!", "{}"])
def test_nothing_written_is_no_answer(answer):
    assert normalise(answer) in ("", "$", "{}")


def test_a_mixed_number_is_not_read_as_eleven_halves():
    assert normalise("1 1/2") != normalise("11/2")


@given(st.text(alphabet="0123456789.,+-/=%$ {}()\\fracsqtxABle°!", max_size=25))
@settings(max_examples=600, deadline=None)
def test_a_normal_form_is_its_own_normal_form(text):
    once = normalise(text)
    assert normalise(once) == once


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=999))
def test_fractions_keep_their_value(value):
    assert as_fraction(normalise(str(value))) == value


@given(st.decimals(min_value=-10000, max_value=10000, places=3))
def test_decimals_keep_their_value(value):
    assert as_fraction(normalise(str(value))) == value


def test_prose_is_told_from_algebra():
    assert is_words("no solution")
    assert is_words("dog")
    assert not is_words("xy")
    assert not is_words("2x+1")
    assert not is_words(r"\pi")


def test_a_text_too_long_to_be_an_answer_is_only_stripped():
    text = " 01" * 2000
    assert normalise(text) == text.strip()
