import random
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.detokenizer import Detokenizer
from dist_vlm.engine.front import load_tokenizer

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "checkpoint"
TEXTS = [
    "plain words",
    "naïve café — ünïcode",
    "日本語のテキスト",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈 flags",
    "tabs\tand\n\nlines",
    " lead",
]


def byte_fallback_tokenizer():
    """As Llama's: a piece for some characters, one for each byte of the others, and the first space stripped."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *"abcdefgé日"]
    model = models.BPE({piece: index for index, piece in enumerate(pieces)}, [], byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def tokenizers(front):
    """Two byte-level ones and one with byte fallback."""
    return {
        "tiny": front.tokenizer,
        "demo": load_tokenizer(str(DEMO)),
        "fallback": byte_fallback_tokenizer(),
    }


def decode(tokenizer, tokens, *, skip=True):
    return tokenizer.decode(tokens, skip_special_tokens=skip)


def streamed(tokenizer, prompt, tokens, *, skip=True):
    """All texts shown on the way, and the last; each piece is what the text grew by."""
    detokenizer = Detokenizer(tokenizer, prompt, skip_special_tokens=skip)
    shown = [""]
    for token in tokens:
        piece = detokenizer.add(token)
        shown.append(shown[-1] + piece)
        assert detokenizer.text == shown[-1]
    piece = detokenizer.finish()
    assert detokenizer.text == shown[-1] + piece
    return shown, detokenizer.text


@pytest.mark.parametrize("name", ["tiny", "demo", "fallback"])
@pytest.mark.parametrize("text", TEXTS)
def test_text_grows_to_the_whole_and_never_by_half_a_character(tokenizers, name, text):
    tokenizer = tokenizers[name]
    prompt = tokenizer.encode("abc: abc")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    shown, final = streamed(tokenizer, prompt, tokens)
    assert final == text
    for part in shown:
        assert text.startswith(part)
        assert "\ufffd" not in part


@pytest.mark.parametrize("name", ["tiny", "demo", "fallback"])
@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=24), prompt=st.text(st.sampled_from("ab é日\U00013000"), max_size=4))
def test_any_text_comes_out_as_it_went_in(tokenizers, name, text, prompt):
    tokenizer = tokenizers[name]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    before = tokenizer.encode("a" + prompt, add_special_tokens=False)
    shown, final = streamed(tokenizer, before, tokens, skip=False)
    # What holds the place of a character in the text itself is held back until it is clear that it is one.
    assert final == text
    assert all(text.startswith(part) for part in shown)


@pytest.mark.parametrize("name", ["tiny", "demo"])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_tokens_give_what_decoding_them_all_gives(tokenizers, name, data):
    """Random tokens of a byte-level vocabulary: bytes that make no character, and special tokens, among them."""
    tokenizer = tokenizers[name]
    token = st.integers(0, len(tokenizer) - 1) | st.integers(0, 260)
    prompt = [67, *data.draw(st.lists(token, max_size=8)), 67]
    tokens = data.draw(st.lists(token, max_size=31))
    skip = data.draw(st.booleans())
    shown, final = streamed(tokenizer, prompt, tokens, skip=skip)
    assert final == decode(tokenizer, prompt + tokens, skip=skip)[len(decode(tokenizer, prompt, skip=skip)) :]
    assert all(final.startswith(part) and not part.endswith("\ufffd") for part in shown)


def test_a_prompt_that_ends_in_half_a_character_is_not_shown(front):
    half = front.tokenizer.encode("ok \U00013000", add_special_tokens=False)[:-1]
    tokens = front.tokenizer.encode(" then", add_special_tokens=False)
    shown, final = streamed(front.tokenizer, half, tokens)
    assert final == " then"
    assert shown[1] == decode(front.tokenizer, tokens[:1])


def test_a_character_cut_off_by_the_end_is_shown_as_such(front):
    # A hieroglyph of four bytes: no tokenizer trained on program text has it whole.
    tokens = front.tokenizer.encode("ok \U00013000", add_special_tokens=False)
    shown, final = streamed(front.tokenizer, [1], tokens[:-1])
    assert (shown[-1], final) == ("ok ", "ok \ufffd")


def test_bytes_that_never_make_a_character_break_nothing(tokenizers):
    """A decoder with byte fallback, as Llama's tokenizers have, fed every kind of byte in any order."""
    tokenizer = tokenizers["fallback"]
    letters = {letter: tokenizer.convert_tokens_to_ids(letter) for letter in "ab"}
    odd = [3 + byte for byte in (0x80, 0xC3, 0xA9, 0xE6, 0x97, 0xA5, 0xFF)]
    choices = [tokenizer.convert_tokens_to_ids("\u2581"), *letters.values(), *odd]
    for seed in range(400):
        draw = random.Random(seed)
        tokens = [draw.choice(choices) for _ in range(draw.randint(1, 60))]
        _, final = streamed(tokenizer, [letters["a"]], tokens)
        ascii_of = lambda text: [char for char in text if char in "ab"]  # noqa: E731
        assert ascii_of(final) == ascii_of(decode(tokenizer, tokens)), tokens


def test_special_tokens_are_left_out_or_kept(front):
    tokens = [*front.tokenizer.encode("done", add_special_tokens=False), 2]
    assert streamed(front.tokenizer, [1], tokens, skip=True)[1] == "done"
    assert streamed(front.tokenizer, [1], tokens, skip=False)[1] == "done</s>"


@pytest.mark.parametrize("name", ["tiny", "fallback"])
def test_tokens_without_text_are_not_read_again_and_again(tokenizers, name):
    """8,000 special tokens left out: decoding all that is held with each of them takes 32 million token decodings."""
    tokenizer = tokenizers[name]
    word = tokenizer.encode("a b", add_special_tokens=False)
    began = time.process_time()
    shown, final = streamed(tokenizer, word, [2] * 8000 + tokenizer.encode(" c", add_special_tokens=False))
    assert time.process_time() - began < 1.5
    assert (shown[8000], final) == ("", " c")


def test_bytes_without_end_are_shown_in_the_end_and_not_read_again_and_again(front):
    lone = front.tokenizer.convert_tokens_to_ids("\u0122")  # the byte 0x80, which continues nothing
    assert decode(front.tokenizer, [lone]) == "\ufffd"
    began = time.process_time()
    _, final = streamed(front.tokenizer, [67], [lone] * 8000 + front.tokenizer.encode("c", add_special_tokens=False))
    assert time.process_time() - began < 1.5
    assert final == "\ufffd" * 8000 + "c"
