"""Where answers stand: the same answers that grading reads, in characters and in tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_urlvr.config.data import GradingSection
from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.grading.grader import Grader
from megatron_urlvr.data.grading.locate import tokens_at
from megatron_urlvr.data.grading.text import TextGrader
from megatron_urlvr.data.tasks import get_task

GRADERS = {
    "boxed": TextGrader(GradingSection(extract="boxed", equivalence="exact")),
    "hash": TextGrader(GradingSection(extract="hash", equivalence="exact")),
    "regex": TextGrader(GradingSection(extract="regex", pattern=r"is ([^ ]*)", equivalence="exact")),
    "chain_sum": get_task("chain_sum", {}).grader(),
    "countdown": get_task("countdown", {}).grader(),
}
PIECES = st.sampled_from(["\\boxed{", "}", "#", "is ", "4", "25+7*3", " ", "\n", "?", "{", "x", "$"])


@pytest.mark.parametrize("name", GRADERS)
@given(pieces=st.lists(PIECES, max_size=12), finished=st.booleans())
def test_the_text_at_the_place_is_the_answer(name, pieces, finished):
    grader, text = GRADERS[name], "".join(pieces)
    answer, place = grader.extract(text, finished=finished), grader.locate(text, finished=finished)
    assert (answer is None) == (place is None)
    if place is not None and answer is not None:
        assert grader.normalise(text[place[0] : place[1]]) == answer


def test_a_grader_that_cannot_tell_says_so():
    class Own(Grader):
        def extract(self, text, *, finished=True):
            return text

    with pytest.raises(DataError, match="Own cannot say where"):
        Own().locate("4")


VOCABULARY = ["a", "bc", "def", " g", "", "42", "{", "}"]
"""Token texts; the fifth is a special token, which decodes to nothing."""


def decode(tokens):
    return "".join(VOCABULARY[token] for token in tokens)


@given(tokens=st.lists(st.integers(0, 7), min_size=1, max_size=30), data=st.data())
def test_the_tokens_cover_the_characters_and_no_token_more(tokens, data):
    text = decode(tokens)
    if not text:
        return
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    first, last = tokens_at(tokens, (start, end), decode)
    begins = [len(decode(tokens[:k])) for k in range(len(tokens) + 1)]
    covering = [k for k in range(len(tokens)) if begins[k] < end and begins[k + 1] > start]
    assert (first, last) == (covering[0], covering[-1] + 1)
