import pytest

from dist_vlm.sched.queue import RequestQueue
from dist_vlm.sched.request import Request


def request(name, priority, arrival):
    return Request(name, (1,), max_tokens=1, priority=priority, arrival=arrival)


def test_by_priority_then_arrival_and_a_returning_request_finds_its_old_place():
    queue = RequestQueue()
    low, old, new, urgent = request("low", 5, 0), request("old", 0, 1), request("new", 0, 2), request("urgent", -1, 3)
    for one in (new, low, urgent, old):
        queue.add(one)
    assert [one.request_id for one in queue] == ["urgent", "old", "new", "low"]
    assert (queue.first, queue.last, len(queue)) == (urgent, low, 4)
    queue.remove(old)
    queue.add(old)
    assert [one.request_id for one in queue] == ["urgent", "old", "new", "low"]
    with pytest.raises(ValueError, match="'gone' is not in this queue"):
        queue.remove(request("gone", 0, 1))


def test_it_may_change_while_it_is_walked():
    queue = RequestQueue()
    for index in range(3):
        queue.add(request(str(index), 0, index))
    for one in queue:
        queue.remove(one)
    assert not queue
