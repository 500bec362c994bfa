import pytest

from dist_vlm.sched.request import Request, RequestState


def test_a_request_ends_once():
    request = Request("a", (1, 2), max_tokens=4)
    request.finish("stop", 7)
    assert (request.state, request.finish_reason, request.stop_reason) == (RequestState.FINISHED, "stop", 7)
    with pytest.raises(RuntimeError, match="ended twice"):
        request.finish("abort")


def test_the_last_token_of_a_generation_is_never_computed():
    request = Request("a", (1, 2, 3), max_tokens=2)
    assert request.num_missing == 3
    request.num_planned, request.num_pending = 3, 1
    assert request.num_missing == 1
    request.num_planned, request.num_pending, request.output_token_ids = 4, 1, [9]
    assert request.num_tokens == 5
    assert request.num_missing == 0
