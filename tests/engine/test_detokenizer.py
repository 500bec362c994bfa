import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

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
    # A hieroglyph of four bytes: no tokenizer trained on program text has it whole.
    tokens = front.tokenizer.encode("ok \U00013000", add_special_tokens=False)
    detokenizer = Detokenizer(front.tokenizer, [1], skip_special_tokens=True)
    detokenizer.add(tokens[:-1])
    assert detokenizer.text == "ok "
    detokenizer.finish()
    assert detokenizer.text == "ok \ufffd"


def test_bytes_that_never_make_a_character_break_nothing():
    """A decoder with byte fallback, as Llama's tokenizers have, fed every kind of byte in any order."""
    pieces = ["<s>", "\u2581a", "b", *(f"<0x{byte:02X}>" for byte in (0x80, 0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xFF))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    for seed in range(1500):
        draw = random.Random(seed)
        tokens = [draw.randrange(1, len(pieces)) for _ in range(draw.randint(1, 12))]
        detokenizer = Detokenizer(wrapped, [1, 2], skip_special_tokens=True)
        for token in tokens:
            detokenizer.add([token])
        detokenizer.finish()
        ascii_of = lambda text: [char for char in text if char in "ab"]  # noqa: E731
        assert ascii_of(detokenizer.text) == ascii_of(tokenizer.decode(tokens)), tokens


def test_special_tokens_are_left_out_or_kept(front):
    tokens = [*front.tokenizer.encode("done", add_special_tokens=False), 2]
    for skip, expected in ((True, "done"), (False, "done</s>")):
        detokenizer = Detokenizer(front.tokenizer, [1], skip_special_tokens=skip)
        detokenizer.add(tokens)
        detokenizer.finish()
        assert detokenizer.text == expected
