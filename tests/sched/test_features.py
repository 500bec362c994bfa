from dist_vlm.sched.features import FeatureTable, overlapping
from dist_vlm.workers.plan import ImageSpan


def test_an_image_is_encoded_for_its_first_request_and_dropped_after_its_last():
    table = FeatureTable()
    assert table.need("x", "a")
    assert not table.need("x", "b")
    table.give_up(["x"], "a")
    assert table.take_droppable() == ()
    table.give_up(["x"], "b")
    assert table.is_resident("x")
    assert table.take_droppable() == ("x",)
    assert not table.is_resident("x")
    assert table.need("x", "c")


def test_an_image_wanted_again_before_the_next_plan_is_not_encoded_again():
    table = FeatureTable()
    table.need("x", "a")
    table.give_up(["x"], "a")
    assert not table.need("x", "b")
    assert table.take_droppable() == ()


def test_a_failed_image_is_forgotten():
    table = FeatureTable()
    table.need("x", "a")
    table.lose("x")
    assert not table.is_resident("x")
    assert table.take_droppable() == ()
    assert table.need("x", "b")


def test_overlapping_spans():
    spans = (ImageSpan("x", 2, 3), ImageSpan("y", 5, 1), ImageSpan("z", 9, 4))
    assert [span.image for span in overlapping(spans, 0, 2)] == []
    assert [span.image for span in overlapping(spans, 4, 6)] == ["x", "y"]
    assert [span.image for span in overlapping(spans, 12, 13)] == ["z"]
