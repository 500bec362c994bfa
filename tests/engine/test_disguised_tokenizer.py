from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.disguised_tokenizer import DisguisedTokenizer
from dist_vlm.engine.special_text import SpecialText

from . import small_tokenizers

WORDS = ("the cat", " the", "cat ", "\n", " ", "  ", "é☃", "12", "</", "s>", "<ima", "ge>", "x\u0301", "\u0301")
TEXTS = st.lists(st.sampled_from(WORDS), max_size=5).map("".join)


def disguised(tokenizer):
    special = SpecialText(tokenizer, image_token_id=None)
    return DisguisedTokenizer(tokenizer, special.ids), special


@pytest.fixture(scope="module")
def demo_tokenizer():
    return PreTrainedTokenizerFast.from_pretrained("examples/demo/checkpoint")


@pytest.fixture(scope="module", params=["demo", "first", "always", "legacy", "unigram", "lower"])
def pair(request, demo_tokenizer):
    tokenizer = {
        "demo": lambda: demo_tokenizer,
        "first": small_tokenizers.metaspace,
        "always": lambda: small_tokenizers.metaspace(scheme="always"),
        "legacy": small_tokenizers.legacy,
        "unigram": small_tokenizers.unigram,
        "lower": small_tokenizers.lower_case,
    }[request.param]()
    return tokenizer, *disguised(tokenizer)


@settings(max_examples=150, deadline=None)
@given(
    pieces=st.lists(st.tuples(TEXTS, st.sampled_from(["<s>", "</s>", "<image>"])), max_size=4),
    last=TEXTS,
    add=st.booleans(),
)
def test_meant_tokens_are_found_as_the_tokenizer_finds_them(pair, pieces, last, add):
    """Where a text spells only what is meant, the copy and the tokenizer agree, wherever special tokens stand."""
    tokenizer, copy, special = pair
    text = "".join(f"{piece}{token}" for piece, token in pieces) + last
    token_ids = copy.encode(text, special.spans(text), add_special_tokens=add)
    assert token_ids == tokenizer(text, add_special_tokens=add)["input_ids"]


WITHOUT = ("<unk>", "<s>")


@pytest.fixture(scope="module", params=["first", "always", "legacy", "legacy-normalized"])
def ignorant(request):
    """A tokenizer's copy, and a tokenizer with the same vocabulary and merges that knows no </s> and no <image>."""
    make, options, reference_options = {
        "first": (small_tokenizers.metaspace, {}, {}),
        "always": (small_tokenizers.metaspace, {"scheme": "always"}, {"scheme": "always"}),
        "legacy": (small_tokenizers.legacy, {}, {}),
        # Looked for in normalized text they are found only behind a space there; the copy finds them anywhere.
        "legacy-normalized": (small_tokenizers.legacy, {"normalized": True}, {"normalized": False}),
    }[request.param]
    return *disguised(make(**options)), make(specials=WITHOUT, **reference_options)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["the cat", " ", "</s>", "<s>", "<image>", "<unk>", "\n", "é"]), max_size=6))
def test_spelled_tokens_are_what_a_tokenizer_without_them_makes_of_the_text(ignorant, words):
    copy, special, reference = ignorant
    text = "".join(words)
    meant = [span for span in special.spans(text) if text[slice(*span)] in WITHOUT]
    token_ids = copy.encode(text, meant, add_special_tokens=False)
    assert token_ids == reference(text, add_special_tokens=False)["input_ids"]


def test_all_spelled_is_what_transformers_splits(demo_tokenizer):
    copy, _ = disguised(demo_tokenizer)
    text = "What do </s>, <s> and <image> mean?<pad>"
    expected = demo_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert copy.encode(text, [], add_special_tokens=False) == expected
    assert copy.encode(text, [], add_special_tokens=True) == [demo_tokenizer.bos_token_id, *expected]


def test_a_vocabulary_whose_best_piece_is_the_special_token_does_not_make_it_of_text():
    copy, special = disguised(small_tokenizers.unigram())
    token_ids = copy.encode("the</s>", [], add_special_tokens=False)
    assert special.ids["</s>"] not in token_ids
    spelled = [token for token in token_ids if token != 4]
    assert len(spelled) == len("</s>"), "one token a letter"


def test_a_merge_that_ends_in_a_special_token_is_left_out():
    """Plain BPE that was trained on text with the token in it."""
    vocab = {token: index for index, token in enumerate(["<", "/", "s", ">", "</", "</s", "</s>", "a", "s>"])}
    merges = [("<", "/"), ("</", "s"), ("</s", ">")]
    backend = Tokenizer(models.BPE(vocab, merges))
    assert backend.encode("a</s>").ids == [7, 6], "of plain text"
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    copy, special = disguised(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert copy.encode("a</s></s>", [(5, 9)], add_special_tokens=False) == [7, 5, 3, 6]
    assert special.ids == {"</s>": 6}


def test_a_whole_word_of_the_vocabulary_does_not_make_it_of_text():
    """`ignore_merges` takes a word that stands in the vocabulary as it is."""
    vocab = {token: index for index, token in enumerate(["<", "/", "s", ">", "</s>", "a"])}
    backend = Tokenizer(models.BPE(vocab, [], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    copy, _ = disguised(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert copy.encode("a </s> </s>", [(2, 6)], add_special_tokens=False) == [5, 4, 0, 1, 2, 3]


def test_word_pieces_with_an_unknown_token_by_name():
    vocab = {token: index for index, token in enumerate(["[UNK]", "[SEP]", "a", "[", "]", "##s", "sep", "##]"])}
    backend = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("[UNK]", "[SEP]")])
    copy, _ = disguised(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]"))
    # "SEP" in capitals is no word of the vocabulary.
    assert copy.encode("a [SEP] [SEP]", [(2, 7)], add_special_tokens=False) == [2, 1, 3, 0, 4]


def test_truncation_and_padding_in_the_tokenizers_file_do_not_count(demo_tokenizer):
    backend = Tokenizer.from_str(demo_tokenizer.backend_tokenizer.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=50)
    copy, _ = disguised(PreTrainedTokenizerFast(tokenizer_object=backend))
    text = "What is the colour of </s>?"
    expected = demo_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert copy.encode(text, [], add_special_tokens=False) == expected


def test_a_text_that_holds_the_secret_gets_another(demo_tokenizer):
    copy, special = disguised(demo_tokenizer)
    name = copy._names["</s>"]
    text = f"is {name} </s> the name"
    expected = demo_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert copy.encode(text, [], add_special_tokens=False) == expected
    assert copy._names["</s>"] != name


class _Bare:
    """What a `PreTrainedTokenizerFast` shows of a backend that transformers itself would refuse to hold."""

    unk_token_id = None

    def __init__(self, backend):
        self.backend_tokenizer = backend
        self.added_tokens_decoder = backend.get_added_tokens_decoder()


def test_a_tokenizer_that_cannot_be_copied_is_an_error():
    class Custom:
        def pre_tokenize(self, text):
            pass

    backend = Tokenizer(models.BPE({"a": 0}, []))
    backend.add_special_tokens(["</s>"])
    backend.pre_tokenizer = pre_tokenizers.PreTokenizer.custom(Custom())
    with pytest.raises(ValueError, match="this tokenizer cannot be copied"):
        disguised(_Bare(backend))
