from __future__ import annotations

import pytest

from dist_vlm.workers.models.json_fields import Fields, read_object
from dist_vlm.workers.models.spec import CheckpointError


@pytest.mark.parametrize(
    ("content", "message"), [(None, "is missing"), ("{", "is not JSON"), ("[]", "is not a JSON object")]
)
def test_a_file_that_holds_no_object_is_named(tmp_path, content, message) -> None:
    file = tmp_path / "config.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(CheckpointError, match=f"config.json {message}"):
        read_object(file)


def test_absent_and_null_fields_take_the_default(tmp_path) -> None:
    fields = Fields(tmp_path / "x.json", {"a": None, "n": 3, "list": [1, 2]})
    assert fields.integer("a", 7) == 7
    assert fields.integer("absent", 7) == 7
    assert fields.integer("n", 7) == 3
    assert fields.integers("absent") is None
    assert fields.integers("list") == (1, 2)
    assert fields.integers("n") == (3,)
    assert fields.section("absent").values == {}
    assert fields.text("a", "x") == "x"


def test_a_required_field_that_is_absent_is_named_with_its_section(tmp_path) -> None:
    fields = Fields(tmp_path / "x.json", {"inner": {}}).section("inner")
    with pytest.raises(CheckpointError, match="x.json: inner.size is None, must be an integer of at least 1"):
        fields.integer("size")
