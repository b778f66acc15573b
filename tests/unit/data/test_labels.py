import pytest

from megatron_urlvr.data.labels import LabelStore, total_uses, uses_of


def test_every_reading_is_counted_by_its_purpose():
    store = LabelStore()
    store.add("train/0", "7")
    assert store.get("train/0", use="audit") == "7"
    assert store.get("train/1", use="audit") is None
    assert store.get("train/0", use="evaluation:held_out") == "7"
    assert store.uses == {"audit": 2, "evaluation:held_out": 1}
    assert "train/0" in store
    assert "train/1" not in store
    assert len(store) == 1


def test_a_reading_without_a_purpose_is_refused():
    with pytest.raises(ValueError, match="named use"):
        LabelStore().get("train/0", use="")


def test_a_second_label_for_a_prompt_is_refused_and_the_same_one_is_not():
    store = LabelStore()
    store.add("a", "1")
    store.add("a", "1")
    with pytest.raises(ValueError, match="'a' already has the label '1'"):
        store.add("a", "2")


@pytest.mark.parametrize(
    ("replicas", "expected"), [(1, [[3, 4]]), (2, [[1, 0], [2, 4]]), (3, [[3, 4], [0, 0], [0, 0]])]
)
def test_no_use_is_lost_or_counted_twice_when_a_run_goes_on_with_other_replicas(replicas, expected):
    kept = [{"audit": 1}, {"audit": 2, "reward": 4}]
    goes_on = [uses_of(kept, replica, replicas) for replica in range(replicas)]
    assert [[each.get("audit", 0), each.get("reward", 0)] for each in goes_on] == expected
    assert total_uses(goes_on) == {"audit": 3, "reward": 4}
