import json

import pytest

from megatron_urlvr.data.errors import DataError
from megatron_urlvr.data.stream import PromptStream
from megatron_urlvr.types import Prompt

PROMPTS = [Prompt(id=str(i), text=str(i), tokens=(i,)) for i in range(10)]


def ids(prompts):
    return [int(prompt.id) for prompt in prompts]


def test_each_epoch_serves_every_prompt_once_in_a_new_order():
    stream = PromptStream(PROMPTS, seed=0, shuffle=True)
    epochs = [ids(stream.next(5)) + ids(stream.next(5)) for _ in range(4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_without_shuffling_the_order_is_the_given_one_again_and_again():
    stream = PromptStream(PROMPTS, seed=0, shuffle=False)
    served = [i for _ in range(5) for i in ids(stream.next(4))]
    assert served == [*range(10), *range(10)]


@pytest.mark.parametrize("n", range(1, 11))
def test_no_batch_holds_a_prompt_twice_and_all_are_served_equally_often(n):
    stream = PromptStream(PROMPTS, seed=3, shuffle=True)
    batches = [ids(stream.next(n)) for _ in range(30)]
    assert all(len(set(batch)) == n for batch in batches)
    served = [i for batch in batches for i in batch]
    counts = [served.count(i) for i in range(10)]
    assert max(counts) - min(counts) <= 1


def test_seeds_differ_and_a_seed_repeats():
    first, same, other = (PromptStream(PROMPTS, seed=s, shuffle=True) for s in (1, 1, 2))
    order = ids(first.next(10))
    assert ids(same.next(10)) == order
    assert ids(other.next(10)) != order


def test_a_stream_continues_from_any_saved_place_exactly():
    stream = PromptStream(PROMPTS, seed=0, shuffle=True)
    for _ in range(12):
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = PromptStream(PROMPTS, seed=0, shuffle=True)
        resumed.load_state_dict(state)
        after = [ids(resumed.next(3)) for _ in range(6)]
        expected = PromptStream(PROMPTS, seed=0, shuffle=True)
        expected.load_state_dict(state)
        assert after == [ids(expected.next(3)) for _ in range(6)]
        assert after[0] == ids(stream.next(3))


def test_a_place_in_other_data_is_refused():
    state = PromptStream(PROMPTS, seed=0, shuffle=True).state_dict()
    with pytest.raises(DataError, match="size was 10, is 9"):
        PromptStream(PROMPTS[:9], seed=0, shuffle=True).load_state_dict(state)
    with pytest.raises(DataError, match="seed was 0, is 1"):
        PromptStream(PROMPTS, seed=1, shuffle=True).load_state_dict(state)


def test_a_batch_larger_than_the_set_is_refused():
    with pytest.raises(DataError, match="batch of 11 prompts was asked for, and the set has 10"):
        PromptStream(PROMPTS, seed=0, shuffle=True).next(11)


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="empty"):
        PromptStream([], seed=0, shuffle=True)
