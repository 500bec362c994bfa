from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_vlm.config_fields import Rule
from dist_vlm.config_kinds import KINDS

STRINGS = Rule(kind="strings", help="")
MAYBE_STRINGS = Rule(kind="strings", help="", optional=True)
PREFIX = Rule(kind="path_prefix", help="")
KEY = Rule(kind="key", help="")
FILE = Rule(kind="file", help="")
TEMPLATE = Rule(kind="template", help="")


@pytest.mark.parametrize(
    ("rule", "value", "kept"),
    [
        (STRINGS, [], ()),
        (STRINGS, ["a", "b c"], ("a", "b c")),
        (STRINGS, ("a",), ("a",)),
        (MAYBE_STRINGS, None, None),
        (PREFIX, "", ""),
        (PREFIX, "/a", "/a"),
        (PREFIX, "/a/b-1/~c%20", "/a/b-1/~c%20"),
        (PREFIX, "/...", "/..."),
        (KEY, "sk-!~", "sk-!~"),
        (FILE, Path("/a/b.pem"), "/a/b.pem"),
        (TEMPLATE, Path("t.jinja"), "t.jinja"),
        (TEMPLATE, "{{ messages }}\n", "{{ messages }}\n"),
    ],
)
def test_a_fitting_value_is_kept_in_its_canonical_form(rule: Rule, value: Any, kept: Any) -> None:
    found = rule.check(value)
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    ("rule", "value", "allowed"),
    [
        (STRINGS, "a", r'must be a list of strings, such as \["a", "b"\]$'),
        (STRINGS, None, "must be a list of strings"),
        (STRINGS, ["a", 1], "must be a list of strings"),
        (STRINGS, ["a", " "], "must be a list of strings, .*, not empty and without NUL"),
        (STRINGS, ["a\0"], "without NUL"),
        (STRINGS, {"a": 1}, "must be a list of strings"),
        (MAYBE_STRINGS, "a", r"must be a list of strings, .*, or none$"),
        (PREFIX, None, "must be empty, or a path such as /models/one, without a slash at its end"),
        (PREFIX, "/", "without a slash at its end"),
        (PREFIX, "a", "must be empty, or a path"),
        (PREFIX, "/a/", "without a slash at its end"),
        (PREFIX, "/a//b", "must be empty, or a path"),
        (PREFIX, "/a/../b", "must be empty, or a path"),
        (PREFIX, "/.", "must be empty, or a path"),
        (PREFIX, "/a?b", "must be empty, or a path"),
        (PREFIX, "/a\n", "must be empty, or a path"),
        (PREFIX, "/é", "must be empty, or a path"),
        (KEY, "", "must be a string of visible ASCII characters, without spaces$"),
        (KEY, "a b", "visible ASCII"),
        (KEY, "a\n", "visible ASCII"),
        (KEY, "clé", "visible ASCII"),
        (KEY, 1234, "visible ASCII"),
        (FILE, "", "not empty"),
        (FILE, 3, "must be a string"),
    ],
)
def test_a_wrong_value_is_told_what_is_allowed(rule: Rule, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        rule.check(value)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("*", ("*",)),
        ("GET, POST", ("GET", "POST")),
        ('["*"]', ("*",)),
        (' ["a,b", "c"]', ("a,b", "c")),
        ("[]", ()),
        ("none", ("none",)),
    ],
)
def test_strings_of_a_command_line_are_json_or_stand_between_commas(text: str, kept: tuple[str, ...]) -> None:
    assert STRINGS.parse(text) == kept


def test_none_stands_for_no_list_where_there_may_be_none() -> None:
    assert MAYBE_STRINGS.parse("none") is None


@pytest.mark.parametrize("text", ["", "a,", ",", "[", '["a"', "[1]", '["a", ""]', "[" * 100_000])
def test_strings_that_are_no_list_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be a list of strings"):
        STRINGS.parse(text)


@pytest.mark.parametrize(
    ("kind", "value", "is_path"),
    [
        ("directory", "./m", True),
        ("file", "../a.pem", True),
        ("template", "./t.jinja", True),
        ("template", "./{{ messages }}", False),
        ("template", None, False),
        ("str", "./a", False),
        ("file", None, False),
    ],
)
def test_what_names_a_path(kind: str, value: str | None, is_path: bool) -> None:
    assert KINDS[kind].names_path(value) is is_path
