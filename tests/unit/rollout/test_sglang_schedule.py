"""Whatever servers do and in whatever order, every sample is delivered exactly once and no server is overloaded."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_urlvr.rollout.schedule import Job, Schedule


@settings(max_examples=300, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_any_history_delivers_every_sample_exactly_once(
    data: st.DataObject, prompts: int, n: int, servers: int, limit: int
) -> None:
    schedule = Schedule(prompts, n)
    names = [f"s{k}" for k in range(servers)]
    up: set[str] = set()
    flying: list[tuple[str, Job]] = []
    delivered: list[Job] = []
    for _ in range(data.draw(st.integers(0, 60))):
        kind = data.draw(st.sampled_from(["join", "leave", "answer", "fail"]))
        if kind in ("join", "leave"):
            name = data.draw(st.sampled_from(names))
            schedule.join(name, limit) if kind == "join" else schedule.leave(name)
            up = up | {name} if kind == "join" else up - {name}
        elif flying:
            server, job = flying.pop(data.draw(st.integers(0, len(flying) - 1)))
            if kind == "fail":
                schedule.failed(server, job)
            elif schedule.delivered(server, job):
                delivered.append(job)
        flying += list(schedule.assign())
        assert all(schedule.running_on(name) <= limit for name in names)
    # From here on one server lives and answers: that must be enough.
    schedule.join("last", limit)
    for _ in range(4 * prompts * n + len(flying) + 1):
        flying += list(schedule.assign())
        if not flying:
            break
        server, job = flying.pop(0)
        if schedule.delivered(server, job):
            delivered.append(job)
    assert schedule.finished
    assert sorted(delivered, key=lambda j: (j.prompt, j.index)) == [Job(p, i) for p in range(prompts) for i in range(n)]


def test_the_votes_of_a_prompt_go_to_one_server_and_servers_share_the_prompts() -> None:
    schedule = Schedule(6, 4)
    schedule.join("a", 100)
    schedule.join("b", 100)
    homes: dict[int, set[str]] = {}
    for server, job in schedule.assign():
        homes.setdefault(job.prompt, set()).add(server)
    assert all(len(servers) == 1 for servers in homes.values())
    assert sorted(next(iter(servers)) for servers in homes.values()) == ["a", "a", "a", "b", "b", "b"]


def test_a_failed_sample_goes_elsewhere_where_there_is_an_elsewhere() -> None:
    schedule = Schedule(1, 1)
    schedule.join("a", 1)
    [(server, job)] = schedule.assign()
    schedule.failed(server, job)
    schedule.join("b", 1)
    assert list(schedule.assign()) == [("b", job)]
    schedule.failed("b", job)
    schedule.leave("a")
    assert list(schedule.assign()) == [("b", job)]


def test_an_answer_after_the_server_was_given_up_counts_and_the_second_one_does_not() -> None:
    schedule = Schedule(1, 1)
    schedule.join("a", 1)
    [(_, job)] = schedule.assign()
    schedule.leave("a")
    schedule.join("b", 1)
    assert list(schedule.assign()) == [("b", job)]
    assert schedule.delivered("a", job)
    assert not schedule.delivered("b", job)
    assert schedule.finished
