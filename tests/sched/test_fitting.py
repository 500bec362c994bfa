import pytest

from dist_vlm.sched.block_pool import BlockPool
from dist_vlm.sched.features import FeatureTable
from dist_vlm.sched.fitting import blocking_resource, check_fits
from dist_vlm.sched.request import Request
from dist_vlm.workers.plan import ImageSpan

POOL = BlockPool(4, 4)


def request(length, max_tokens=1, images=()):
    return Request("a", (1,) * length, max_tokens=max_tokens, images=images)


def test_the_resource_that_lacks_is_named_with_its_numbers():
    assert blocking_resource(request(15), POOL, FeatureTable()) is None
    assert blocking_resource(request(16), POOL, FeatureTable()) == (
        "prompt and max_tokens are 17 tokens; the KV cache holds 16"
    )
    image = (ImageSpan("x", 0, 9),)
    assert blocking_resource(request(12, images=image), POOL, FeatureTable(9)) is None
    assert blocking_resource(request(12, images=image), POOL, FeatureTable(8)) == (
        "an image has 9 feature rows; the feature cache holds 8"
    )


def test_an_empty_request_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        check_fits(request(0), POOL, FeatureTable())
    with pytest.raises(ValueError, match="max_tokens = 0"):
        check_fits(request(1, 0), POOL, FeatureTable())
    with pytest.raises(ValueError, match="KV cache holds 16"):
        check_fits(request(99), POOL, FeatureTable())
