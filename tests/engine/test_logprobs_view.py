from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.logprobs_view import TokenTexts, logprobs_view
from dist_vlm.outputs import Logprob
from dist_vlm.workers.plan import TokenLogprobs

ENTRY = TokenLogprobs(logprob=-1.5, rank=2, top_ids=(74, 5, 9), top_logprobs=(-0.5, -1.5, -3.0))


def test_the_token_comes_first_and_its_place_among_the_likeliest_is_not_told_twice():
    view = logprobs_view(5, ENTRY, num_alternatives=3, texts=None)
    assert list(view.items()) == [(5, Logprob(-1.5, 2)), (74, Logprob(-0.5, 1)), (9, Logprob(-3.0, 3))]


def test_a_token_that_is_none_of_the_likeliest_stands_beside_them():
    entry = TokenLogprobs(logprob=-9.0, rank=812, top_ids=(74, 5), top_logprobs=(-0.5, -1.5))
    view = logprobs_view(300, entry, num_alternatives=2, texts=None)
    assert list(view.items()) == [(300, Logprob(-9.0, 812)), (74, Logprob(-0.5, 1)), (5, Logprob(-1.5, 2))]
    assert list(logprobs_view(300, entry, num_alternatives=0, texts=None)) == [300]


def test_equally_likely_tokens_have_one_rank():
    entry = TokenLogprobs(logprob=-1.0, rank=1, top_ids=(3, 4, 8, 9), top_logprobs=(-1.0, -1.0, -2.0, -2.0))
    view = logprobs_view(4, entry, num_alternatives=4, texts=None)
    assert {token: one.rank for token, one in view.items()} == {3: 1, 4: 1, 8: 3, 9: 3}


def test_texts_of_tokens(front):
    tokenizer = front.tokenizer
    texts = TokenTexts(tokenizer)
    tokens = tokenizer.encode(" two words", add_special_tokens=False)
    assert "".join(texts[token] for token in tokens) == " two words"
    view = logprobs_view(5, ENTRY, num_alternatives=3, texts=texts)
    assert {token: one.decoded_token for token, one in view.items()} == {
        token: tokenizer.decode([token]) for token in (5, 74, 9)
    }
    assert texts[2] == "</s>"
    half = tokenizer.encode("\U00013000", add_special_tokens=False)[0]
    assert texts[half] == "\ufffd"


def test_a_leading_space_is_kept_where_decoders_strip_the_first():
    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "\u2581b": 2}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert wrapped.decode([2]) == "b"
    assert TokenTexts(wrapped)[2] == " b"
