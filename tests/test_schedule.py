"""Fair shares of a batch and of its queue: who is next, who is interrupted, and who gives a place up."""

from concurrent.futures import Future
from types import SimpleNamespace

from medicalgpt.serving.generation import GenerationRequest
from medicalgpt.serving.schedule import Job, QueueFullError, Schedule

import pytest


def job(client: str, tokens: int | None = None, joined_at: int = 0) -> Job:
    """A request, of which this many tokens are generated."""
    state = None if tokens is None else SimpleNamespace(token_ids=[0] * tokens)
    return Job(GenerationRequest([1], client=client), Future(), state, joined_at)


def scheduled(running, waiting=(), places=(4, 4)) -> Schedule:
    schedule = Schedule(*places)
    schedule.running, schedule.waiting = list(running), list(waiting)
    return schedule


def clients(jobs) -> str:
    return "".join(each.client for each in jobs)


def test_places_go_to_the_client_with_the_fewest():
    schedule = scheduled([], [job("a"), job("a"), job("a"), job("b"), job("c")])
    while schedule.take_next() is not None:
        pass
    assert (clients(schedule.running), clients(schedule.waiting)) == ("abca", "a")


def test_one_client_alone_has_everything():
    schedule = scheduled([])
    assert schedule.add([job("a") for _ in range(8)]) == []
    with pytest.raises(QueueFullError):
        schedule.add([job("a")])
    assert len(schedule.waiting) == 8


def test_full_queue_is_shared():
    """The client with the most places gives up the one that it asked for last."""
    running = [job("a", 5) for _ in range(4)]
    waiting = [job("a") for _ in range(4)]
    schedule = scheduled(running, waiting)
    assert schedule.add([job("b")]) == waiting[3:]
    assert schedule.add([job("c"), job("c")]) == [waiting[2], waiting[1]]
    assert clients(schedule.waiting) == "abcc"
    # All or nothing: this many places would be more than those of anyone else.
    before = list(schedule.waiting)
    with pytest.raises(QueueFullError):
        schedule.add([job("d") for _ in range(6)])
    assert schedule.waiting == before


def test_answer_that_has_begun_is_not_dropped():
    suspended = [job("a", 300) for _ in range(4)]
    with pytest.raises(QueueFullError):
        scheduled([job("a", 5) for _ in range(4)], suspended).add([job("b")])


def test_places_of_those_who_have_left_are_free():
    waiting = [job("a") for _ in range(4)]
    schedule = scheduled([job("b", 1) for _ in range(4)], waiting)
    waiting[1].future.cancel()
    assert schedule.add([job("a")]) == []
    assert len(schedule.waiting) == 4


@pytest.mark.parametrize(
    "running, waiting, expected",
    [
        # Not all places are taken, or nobody waits.
        ([("a", 100)] * 3, [("b", None)], None),
        ([("a", 100)] * 4, [], None),
        # The shortest answer of the one that has most makes room, ...
        ([("a", 100), ("a", 20), ("a", 50), ("b", 17)], [("c", None)], 1),
        # ... but not for a client that would then have more.
        ([("a", 100), ("a", 100), ("b", 100), ("b", 100)], [("a", None)], None),
        ([("a", 100), ("a", 100), ("b", 100), ("c", 100)], [("b", None)], None),
        # Not before some progress is made.
        ([("a", 5)] * 4, [("b", None)], None),
        # A much longer answer makes room for a shorter one, of the same client or another one, ...
        ([("a", 255), ("a", 300), ("a", 700), ("a", 600)], [("a", None)], 2),
        ([("a", 300), ("b", 300), ("c", 900), ("d", 300)], [("e", None)], 2),
        # ... not for one that is as long, nor for one of a client that has more already.
        ([("a", 300)] * 4, [("a", 300)], None),
        ([("a", 100), ("a", 100), ("a", 100), ("b", 900)], [("a", None)], None),
    ],
)
def test_who_is_interrupted(running, waiting, expected):
    jobs = [job(*each) for each in running]
    found = scheduled(jobs, [job(*each) for each in waiting]).to_suspend()
    assert found is (None if expected is None else jobs[expected])


def test_interruptions_come_to_an_end():
    """However many wait: who has just joined stays for a while, and the others' turn comes."""
    schedule = scheduled([job("a", 1000) for _ in range(4)], [job(each) for each in "aabbcc"], (4, 9))
    count = 0
    while (leaving := schedule.to_suspend()) is not None:
        schedule.suspend(leaving)
        schedule.take_next()
        count += 1
    assert 0 < count <= 4
    assert len(schedule.running) == 4 and set(clients(schedule.running)) == set("abc")
