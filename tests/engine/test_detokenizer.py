import pytest

from dist_vlm.engine.detokenizer import Detokenizer

TEXTS = [
    "plain words",
    "naïve café — ünïcode",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈 flags",
    "tabs\tand\n\nlines",
    " lead",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_to_the_whole_and_never_by_half_a_character(front, text):
    prompt = front.tokenizer.encode("USER: hi ASSISTANT:")
    tokens = front.tokenizer.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(front.tokenizer, prompt, skip_special_tokens=True)
    seen = ""
    for token in tokens:
        detokenizer.add([token])
        assert detokenizer.text.startswith(seen)
        assert "\ufffd" not in detokenizer.text
        assert text.startswith(detokenizer.text)
        seen = detokenizer.text
    detokenizer.finish()
    assert detokenizer.text == text


def test_a_character_cut_off_by_the_end_is_shown_as_such(front):
    tokens = front.tokenizer.encode("ok 日", add_special_tokens=False)
    byte_tokens = front.tokenizer.encode("日", add_special_tokens=False)
    if len(byte_tokens) < 2:
        pytest.skip("this tokenizer has the character whole")
    detokenizer = Detokenizer(front.tokenizer, [1], skip_special_tokens=True)
    detokenizer.add(tokens[:-1])
    assert detokenizer.text == "ok "
    detokenizer.finish()
    assert detokenizer.text == "ok \ufffd"


def test_special_tokens_are_left_out_or_kept(front):
    tokens = [*front.tokenizer.encode("done", add_special_tokens=False), 2]
    for skip, expected in ((True, "done"), (False, "done</s>")):
        detokenizer = Detokenizer(front.tokenizer, [1], skip_special_tokens=skip)
        detokenizer.add(tokens)
        detokenizer.finish()
        assert detokenizer.text == expected
