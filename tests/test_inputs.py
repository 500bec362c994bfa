import pytest

from dist_vlm.inputs import parse_and_batch_prompt, parse_prompt


def test_every_form_comes_to_one():
    empty = {"prompt": None, "prompt_token_ids": None, "multi_modal_data": None, "cache_salt": ""}
    assert parse_prompt("hi") == {**empty, "prompt": "hi"}
    assert parse_prompt({"prompt": "hi"}) == {**empty, "prompt": "hi"}
    assert parse_prompt({"prompt_token_ids": (1, 2)}) == {**empty, "prompt_token_ids": [1, 2]}
    both = {"prompt": "hi", "prompt_token_ids": [1], "multi_modal_data": {"image": None}}
    assert parse_prompt(both) == {**both, "cache_salt": ""}
    assert parse_prompt({"prompt": "hi", "cache_salt": "tenant"}) == {**empty, "prompt": "hi", "cache_salt": "tenant"}
    assert parse_prompt({"prompt": "hi", "cache_salt": None})["cache_salt"] == ""


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (7, "inputs of type int"),
        (["a"], "inputs of type list"),
        ({"promt": "hi"}, "unknown key 'promt'"),
        ({}, "neither prompt nor prompt_token_ids"),
        ({"prompt": 3}, "prompt of type int"),
        ({"prompt_token_ids": "12"}, "prompt_token_ids of type str"),
        ({"prompt_token_ids": [1, "2"]}, "prompt_token_ids holds '2'"),
        ({"prompt_token_ids": [True]}, "prompt_token_ids holds True"),
        ({"prompt": "hi", "cache_salt": b"x"}, "cache_salt of type bytes: must be a string"),
        ({"prompt": "hi", "cache_salt": "x" * 257}, "cache_salt has 257 characters: must have at most 256"),
        ({"prompt": "hi", "cache_salt": "\udc00"}, "half of a surrogate pair"),
    ],
)
def test_a_wrong_form_is_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        parse_prompt(inputs)


def test_parse_and_batch_prompt():
    assert parse_and_batch_prompt("a") == [{"prompt": "a"}]
    assert parse_and_batch_prompt(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]
    assert parse_and_batch_prompt([1, 2]) == [{"prompt_token_ids": [1, 2]}]
    assert parse_and_batch_prompt([[1], [2]]) == [{"prompt_token_ids": [1]}, {"prompt_token_ids": [2]}]
    with pytest.raises(ValueError, match="please provide at least one prompt"):
        parse_and_batch_prompt([])
    for wrong in (["a", 1], [[]], 5, [[1], "a"]):
        with pytest.raises(ValueError, match="prompt must be a string, array of strings"):
            parse_and_batch_prompt(wrong)
