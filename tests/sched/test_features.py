from dist_vlm.sched.features import FeatureTable, overlapping
from dist_vlm.workers.plan import ImageSpan


def spans(*images, rows=4):
    return [ImageSpan(image, index * rows, rows) for index, image in enumerate(images)]


def encoded(table, images, request_id):
    return [span.image for span in table.need(spans(*images), request_id)]


def test_an_image_is_encoded_for_its_first_request_and_dropped_after_its_last():
    table = FeatureTable()
    assert encoded(table, "x", "a") == ["x"]
    assert encoded(table, "x", "b") == []
    table.give_up(["x"], "a")
    assert table.take_droppable() == ()
    table.give_up(["x"], "b")
    assert table.is_resident("x")
    assert table.take_droppable() == ("x",)
    assert not table.is_resident("x")
    assert encoded(table, "x", "c") == ["x"]


def test_an_image_wanted_again_before_the_next_plan_is_not_encoded_again():
    table = FeatureTable()
    encoded(table, "x", "a")
    table.give_up(["x"], "a")
    assert encoded(table, "x", "b") == []
    assert table.take_droppable() == ()


def test_a_failed_image_is_forgotten():
    table = FeatureTable(8, keep=True)
    encoded(table, "x", "a")
    table.lose("x")
    assert not table.is_resident("x") and table.num_rows == 0
    assert encoded(table, "x", "b") == ["x"]
    assert table.take_droppable() == ("x",), "before it is encoded anew, in the same plan"
    assert table.is_resident("x")
    assert table.take_droppable() == ()


def test_a_failed_image_that_was_dropped_meanwhile_is_not_dropped_again():
    table = FeatureTable()
    encoded(table, "x", "a")
    table.give_up(["x"], "a")
    assert table.take_droppable() == ("x",)
    table.lose("x")
    assert table.take_droppable() == ()


def test_kept_images_go_when_their_room_is_wanted_the_longest_unneeded_first():
    table = FeatureTable(8, keep=True)
    for image in "xy":
        encoded(table, image, "a")
    table.give_up("yx", "a")
    assert table.take_droppable() == ()
    assert encoded(table, "z", "b") == ["z"]
    assert table.take_droppable() == ("y",)
    assert (table.num_rows, table.num_evictions) == (8, 1)
    assert encoded(table, "x", "c") == [], "it was kept"


def test_needed_images_stay_and_what_does_not_fit_beside_them_is_told():
    table = FeatureTable(8, keep=True)
    encoded(table, "x", "a")
    assert table.fits(spans("y"))
    assert table.fits(spans("x", "y")), "x is there already"
    assert not table.fits(spans("y", "z"))
    table.give_up("x", "a")
    assert table.fits(spans("y", "z"))


def test_one_image_twice_in_a_prompt_counts_once():
    table = FeatureTable(4)
    assert table.fits(spans("x", "x"))
    assert encoded(table, "xx", "a") == ["x"]
    assert table.num_rows == 4


def test_overlapping_spans():
    places = (ImageSpan("x", 2, 3), ImageSpan("y", 5, 1), ImageSpan("z", 9, 4))
    assert [span.image for span in overlapping(places, 0, 2)] == []
    assert [span.image for span in overlapping(places, 4, 6)] == ["x", "y"]
    assert [span.image for span in overlapping(places, 12, 13)] == ["z"]
