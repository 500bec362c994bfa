from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.special_text import Marks, Rendered, SpecialText

from . import small_tokenizers


@pytest.fixture(scope="module")
def special():
    tokenizer = PreTrainedTokenizerFast.from_pretrained("examples/demo/checkpoint")
    return SpecialText(tokenizer, image_token_id=493)


WORDS = st.lists(st.sampled_from(["a", " ", "<", "/", "s", ">", "image", "</s>", "<image>", "\U000f0000"]), max_size=8)


def test_the_special_tokens_are_those_marked_special_and_the_placeholder(tiny_facts):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny_facts)
    special = SpecialText(tokenizer, image_token_id=32000)
    assert special.ids == {"<unk>": 0, "<s>": 1, "</s>": 2, "<image>": 32000, "<pad>": 32001}
    assert special.spans("<filler_31990>") == [], "an added token that is not special"
    assert not special.in_normalized
    filler = tokenizer.convert_tokens_to_ids("<filler_31990>")
    assert SpecialText(tokenizer, image_token_id=filler).spans("a<filler_31990>") == [(1, 15)]
    assert SpecialText(small_tokenizers.lower_case(), image_token_id=None).in_normalized


@given(text=WORDS.map("".join))
def test_marks_come_out_as_they_went_in(special, text):
    marks = Marks(special, [text])
    rendered = marks.read(marks.message_text(text))
    assert rendered.text == text
    assert rendered.special_spans == ()
    assert rendered.is_spelled == any(token in text for token in special.ids)
    assert marks.removed(marks.message_text(text)) == text


@given(before=WORDS.map("".join), text=WORDS.map("".join), after=WORDS.map("".join))
def test_exactly_what_the_template_wrote_whole_counts(special, before, text, after):
    """By brute force: an occurrence counts where it lies in what the template wrote before or after the text."""
    marks = Marks(special, [before, text, after])
    rendered = marks.read(before + marks.message_text(text) + after)
    assert rendered.text == before + text + after
    shift = len(before) + len(text)
    expected = special.spans(before) + [(start + shift, end + shift) for start, end in special.spans(after)]
    whole = special.spans(rendered.text)
    if text:
        assert list(rendered.special_spans) == expected
        assert rendered.is_spelled == (whole != expected)
    else:
        assert list(rendered.special_spans) == whole


@pytest.mark.parametrize(
    ("change", "text", "spans"),
    [
        (str.upper, "SAY </S> NOW<s>", [(12, 15)]),
        (str.strip, "say </s> now<s>", [(12, 15)]),
        (str.title, "Say </S> Now<s>", [(12, 15)]),
        (lambda text: text.replace("</s>", "</S>").lower(), "say </s> now<s>", [(12, 15)]),
        # The template takes the text apart at the token it sees in it: nothing of it is left to be one.
        (lambda text: " ".join(text.split("</s>")), "say   now<s>", [(9, 12)]),
        (lambda text: text.split("</s>")[-1], " now<s>", [(4, 7)]),
        (lambda text: text.replace("</s>", "<s>"), "say <s> now<s>", [(11, 14)]),
        (lambda text: text.replace("say", "<image>"), "<image> </s> now<s>", [(0, 7), (16, 19)]),
    ],
)
def test_a_template_may_change_what_it_was_given(special, change, text, spans):
    marks = Marks(special, ["say </s> now"])
    rendered = marks.read(change(marks.message_text("say </s> now")) + "<s>")
    assert rendered.text == text
    assert list(rendered.special_spans) == spans


def test_two_texts_do_not_join_to_a_token(special):
    marks = Marks(special, ["<ima", "ge>"])
    joined = marks.message_text("<ima") + marks.message_text("ge>")
    assert marks.read(joined) == Rendered("<image>", (), True)
    assert marks.read("<" + marks.message_text("/s> 1")) == Rendered("</s> 1", (), True)
    assert marks.read("</" + marks.message_text("s") + ">") == Rendered("</s>", (), True)
    assert marks.read("<" + marks.message_text("IMAGE").lower() + ">") == Rendered("<image>", (), True)
    assert marks.read("<" + marks.message_text("image") + ">") == Rendered("<image>", (), True)
    assert marks.read(marks.message_text("1 <") + "/s> ") == Rendered("1 </s> ", (), True)
    # Edges alone change nothing.
    assert marks.read(marks.message_text("1 <") + "</s>") == Rendered("1 <</s>", ((3, 7),), False)


def test_another_case_is_marked_and_changes_nothing_by_itself(special):
    """A template may lower what it is given; where it does not, the text spells nothing."""
    marks = Marks(special, ["a </S> b"])
    marked = marks.message_text("a </S> b")
    assert marks.read(marked + "<s>") == Rendered("a </S> b<s>", ((8, 11),), False)
    assert marks.read(marked.lower() + "<s>") == Rendered("a </s> b<s>", ((8, 11),), True)


def test_data_is_marked_with_its_keys_and_numbers_stay(special):
    value = {"a": [1, True, None, "x </s>"], "<image>": {"k": "<s>"}}
    marks = Marks(special, [])
    marked = marks.data(value)
    assert marked["a"][:3] == [1, True, None]
    assert list(marked) != list(value)
    rendered = marks.read(str(marked["a"][3]) + list(marked)[1] + marked[list(marked)[1]]["k"])
    assert rendered == Rendered("x </s><image><s>", (), True)


def test_marks_stand_in_no_text(special):
    """Nothing that a client writes can be a mark, however much of the area it uses."""
    text = "".join(map(chr, range(0xF0000, 0xF7000)))
    for _ in range(50):
        marks = Marks(special, [text])
        assert not {marks._opening, marks._closing, marks._edge} & set(text)
    with pytest.raises(ValueError, match="too many to be text"):
        Marks(special, ["".join(map(chr, range(0xF0000, 0xFFFFE)))])


def test_a_tokenizer_without_special_tokens():
    from tokenizers import Tokenizer, models

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    special = SpecialText(tokenizer, image_token_id=None)
    marks = Marks(special, ["a <s>"])
    assert marks.read(marks.message_text("a <s>")) == Rendered("a <s>", (), False)
