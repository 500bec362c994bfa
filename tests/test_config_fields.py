from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_vlm.config_fields import ConfigError, Rule, nearest

COUNT = Rule(kind="int", help="", low=1, high=64)
SHARE = Rule(kind="float", help="", above=0, high=1)
NAME = Rule(kind="str", help="")
TYPE = Rule(kind="str", help="", choices=("auto", "float32"), aliases={"float": "float32"})
BLOCK = Rule(kind="int", help="", choices=(8, 16, 32))
FLAG = Rule(kind="bool", help="")
SHAPE = Rule(kind="shape", help="")
MAYBE = Rule(kind="int", help="", low=0, optional=True)


@pytest.mark.parametrize(
    ("rule", "value", "kept"),
    [
        (COUNT, 1, 1),
        (COUNT, 64, 64),
        (SHARE, 1, 1.0),
        (SHARE, 0.5, 0.5),
        (NAME, "x", "x"),
        (TYPE, "float", "float32"),
        (BLOCK, 32, 32),
        (FLAG, False, False),
        (SHAPE, [1, 3, 336, 336], (1, 3, 336, 336)),
        (SHAPE, "1,3,336, 336", (1, 3, 336, 336)),
        (MAYBE, None, None),
        (MAYBE, 0, 0),
    ],
)
def test_a_fitting_value_is_kept_in_its_canonical_form(rule: Rule, value: Any, kept: Any) -> None:
    found = rule.check(value)
    assert found == kept
    assert type(found) is type(kept)


@pytest.mark.parametrize(
    ("rule", "value", "allowed"),
    [
        (COUNT, True, "must be an integer, at least 1, at most 64"),
        (COUNT, 0, "at least 1"),
        (COUNT, 65, "at most 64"),
        (COUNT, "8", "must be an integer"),
        (COUNT, 8.0, "must be an integer"),
        (COUNT, None, "must be an integer"),
        (SHARE, math.nan, "finite"),
        (SHARE, math.inf, "finite"),
        (SHARE, 10**400, "finite"),
        (SHARE, 0, "must be a number, above 0, at most 1"),
        (SHARE, -0.1, "above 0"),
        (SHARE, True, "must be a number"),
        (SHARE, "0.5", "must be a number"),
        (NAME, "", "not empty"),
        (NAME, "  ", "not empty"),
        (NAME, "a\0b", "without NUL"),
        (NAME, 3, "must be a string"),
        (TYPE, "flaot32", "must be one of auto, float32; the nearest is float32"),
        (TYPE, None, "must be one of"),
        (BLOCK, 12, "must be one of 8, 16, 32"),
        (BLOCK, True, "must be one of 8, 16, 32"),
        (FLAG, 1, "must be true or false"),
        (FLAG, "true", "must be true or false"),
        (SHAPE, [1, 3, 336], "four integers"),
        (SHAPE, [1, 3, 336, True], "four integers"),
        (SHAPE, [1, 3, 0, 336], "each at least 1"),
        (SHAPE, "1,3,336,x", "four integers"),
        (SHAPE, 336, "four integers"),
        (MAYBE, -1, "must be an integer, at least 0, or none"),
    ],
)
def test_a_wrong_value_is_told_what_is_allowed(rule: Rule, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=allowed):
        rule.check(value)


@pytest.mark.parametrize(
    ("rule", "text", "kept"),
    [
        (COUNT, "8", 8),
        (SHARE, "1", 1.0),
        (FLAG, "true", True),
        (FLAG, "False", False),
        (MAYBE, "none", None),
        (NAME, "8", "8"),
    ],
)
def test_text_of_a_command_line_is_read_by_the_type(rule: Rule, text: str, kept: Any) -> None:
    assert rule.parse(text) == kept


@pytest.mark.parametrize(
    ("rule", "text"), [(COUNT, "eight"), (COUNT, "none"), (COUNT, "8.0"), (SHARE, "nan"), (FLAG, "yes"), (SHAPE, "")]
)
def test_wrong_text_is_told_what_is_allowed(rule: Rule, text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        rule.parse(text)


@given(st.sampled_from([COUNT, SHARE, NAME, TYPE, BLOCK, FLAG, SHAPE, MAYBE]), st.text(max_size=30))
def test_any_text_is_kept_or_refused(rule: Rule, text: str) -> None:
    kept, problem = _outcome(rule, text)
    assert "must be" in problem or rule.check(kept) == kept


def _outcome(rule: Rule, text: str) -> tuple[Any, str]:
    try:
        return rule.parse(text), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ConfigError("is empty"), "is empty"),
        (ConfigError("is empty", source="a.yaml"), "a.yaml: is empty"),
        (ConfigError("no", field="cache.x", value=3), "cache.x = 3: no"),
        (ConfigError("no", field="cache.x", value=3, source="a.yaml"), "a.yaml: cache.x = 3: no"),
        (ConfigError("no", field="cache.x", value="3", source="--x"), "--x = '3': no"),
        (ConfigError("no", field="x", value="y" * 500), f"x = '{'y' * 76}...: no"),
    ],
)
def test_an_error_names_place_key_and_value(error: ConfigError, text: str) -> None:
    assert str(error) == text
    assert str(pickle.loads(pickle.dumps(error))) == text


def test_an_error_takes_a_source_once() -> None:
    error = ConfigError("no", field="cache.x", value=3).at("a.yaml")
    assert str(error.at("b.yaml")) == "a.yaml: cache.x = 3: no"
    assert error.field == "cache.x"


def test_the_nearest_name_is_offered_only_when_it_is_near() -> None:
    assert nearest("bolck_size", ["block_size", "seed"]) == "; the nearest is block_size"
    assert nearest("zzz", ["block_size", "seed"]) == ""


def test_an_error_about_a_secret_is_without_it() -> None:
    secret, plain = Rule(kind="key", help=""), Rule(kind="str", help="")
    assert str(secret.error("no", field="server.api_key", value="abc", source="a.yaml")) == "a.yaml: server.api_key: no"
    assert str(plain.error("no", field="server.host", value="abc")) == "server.host = 'abc': no"
