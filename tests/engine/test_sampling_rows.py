import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from dist_vlm.engine.sampling_rows import SamplingRows
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers.plan import SamplingRow


def rows_of(front, **options):
    defaults = {"tokenizer": front.tokenizer, "seed": 0, "max_logprobs": 20, "serves_logits_processors": False}
    return SamplingRows(spec=front.spec, **{**defaults, **options})


def rows(front, params, *, max_tokens=16, stop=frozenset({2})):
    return rows_of(front).rows(params, name="7", max_tokens=max_tokens, stop_token_ids=stop)


def test_a_greedy_row_asks_for_nothing(front):
    assert rows(front, SamplingParams(temperature=0)) == (SamplingRow(),)


def test_every_field_reaches_the_row(front):
    params = SamplingParams(
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, temperature=0.5, top_p=0.9, top_k=5,
        min_p=0.1, seed=11, min_tokens=3, logprobs=2, prompt_logprobs=4, logit_bias={9: -5, 3: 1},
        logits_processors=[len],
    )  # fmt: skip
    assert rows(front, params, stop=frozenset({9, 2})) == (
        SamplingRow(
            temperature=0.5, top_k=5, top_p=0.9, min_p=0.1, seed=11, sample_index=0, presence_penalty=1.0,
            frequency_penalty=-1.0, repetition_penalty=1.5, logit_bias=((3, 1.0), (9, -5.0)), min_tokens=3,
            stop_token_ids=(2, 9), logprobs=2, prompt_logprobs=4, processors="7",
        ),
    )  # fmt: skip


def test_whole_numbers_are_floats_on_the_wire(front):
    (row,) = rows(front, SamplingParams(temperature=1, top_p=1, min_p=0, presence_penalty=1, logit_bias={1: 2}))
    numbers = (row.temperature, row.top_p, row.min_p, row.presence_penalty, row.frequency_penalty, row.logit_bias[0][1])
    assert all(type(number) is float for number in numbers)


def test_answers_share_the_seed_and_differ_in_their_index(front):
    params = SamplingParams(n=2, best_of=3, prompt_logprobs=1)
    made = rows(front, params)
    assert [row.sample_index for row in made] == [0, 1, 2]
    assert len({row.seed for row in made}) == 1
    assert [row.prompt_logprobs for row in made] == [1, None, None], "the prompt is the same for all"
    assert [row.logprobs for row in made] == [0, 0, 0], "candidates are ranked by them"
    assert [row.logprobs for row in rows(front, SamplingParams(n=2))] == [None, None]
    assert [row.logprobs for row in rows(front, SamplingParams(n=1, best_of=2, logprobs=3))] == [3, 3]


def test_seeds(front):
    made = rows_of(front, seed=4)
    drawn = [made.rows(SamplingParams(), name="", max_tokens=1, stop_token_ids=frozenset())[0].seed for _ in range(3)]
    assert len(set(drawn)) == 3
    assert all(0 <= seed < 2**63 for seed in drawn)
    again = rows_of(front, seed=4)
    assert again.rows(SamplingParams(), name="", max_tokens=1, stop_token_ids=frozenset())[0].seed == drawn[0]
    assert rows(front, SamplingParams(seed=5))[0].seed == 5


def test_what_has_no_end_is_bounded(front):
    (row,) = rows(front, SamplingParams(top_k=2**70, min_tokens=2**70, max_tokens=None), max_tokens=28)
    assert (row.top_k, row.min_tokens, row.stop_token_ids) == (front.spec.vocab_size, 28, (2,))
    (row,) = rows(front, SamplingParams(top_k=-1))
    assert (row.top_k, row.stop_token_ids) == (0, ())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"logprobs": 21}, "logprobs = 21: must be at most max_logprobs = 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs = 21: must be at most max_logprobs = 20"),
        ({"stop_token_ids": [32064]}, r"stop_token_ids holds the token 32064: must be in 0 .. 32063"),
        ({"logit_bias": {32064: 1}}, r"logit_bias holds the token 32064: must be in 0 .. 32063"),
        ({"use_beam_search": True}, "use_beam_search = True: not served"),
        ({"logits_processors": [len]}, "logits_processors: served only with executor='inline'"),
    ],
)
def test_what_the_engine_does_not_take_is_named(front, values, message):
    with pytest.raises(ValueError, match=message):
        rows_of(front).check(SamplingParams(**values))
    rows_of(front, serves_logits_processors=True).check(SamplingParams(logits_processors=[len], logprobs=20))


def banned(front, *words):
    return set(rows(front, SamplingParams(bad_words=list(words)))[0].bad_words)


def test_a_bad_word_is_barred_with_and_without_a_space_before_it(front):
    def tokens(text):
        return tuple(front.tokenizer.encode(text, add_special_tokens=False))

    assert tokens("hello") != tokens(" hello")
    assert banned(front, "hello") == banned(front, " hello") == {tokens("hello"), tokens(" hello")}
    assert banned(front, "a", "hello") == {tokens("a"), tokens(" a"), tokens("hello"), tokens(" hello")}
    assert banned(front, "<image>") == {(32000,)}, "with a space before it ends in the same token"
    assert rows(front, SamplingParams())[0].bad_words == ()


def test_every_barred_word_ends_a_text_that_spells_it(front):
    """Each sequence spells the word, and the word's own tokens in a sentence end with one of them."""
    for word in ("hello", "Paris", "naïve", "日本"):
        sequences = banned(front, word)
        assert {front.tokenizer.decode(sequence).strip() for sequence in sequences} == {word}
        for sentence in (word, f"say {word}"):
            written = tuple(front.tokenizer.encode(sentence, add_special_tokens=False))
            assert any(written[-len(sequence) :] == sequence for sequence in sequences), sentence


def test_a_word_that_is_no_token_is_named(front):
    tokenizer = Tokenizer(models.BPE({"a": 0}, []))  # knows one letter, and has no token for others
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(ValueError, match="bad_words holds 'b', of which the tokenizer makes no tokens"):
        rows_of(front, tokenizer=wrapped).rows(
            SamplingParams(bad_words=["b"]), name="", max_tokens=1, stop_token_ids=frozenset()
        )


def test_spaces_between_special_tokens_are_the_tokenizers_own_choice(front):
    without = SamplingParams(spaces_between_special_tokens=False, skip_special_tokens=False)
    assert front.tokenizer.decode([1, 2], skip_special_tokens=False) == "<s></s>"
    rows_of(front).check(without)
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "a": 2}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["[SEP]"])
    spaced = rows_of(front, tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert PreTrainedTokenizerFast(tokenizer_object=tokenizer).decode([1, 1]) == "[SEP] [SEP]"
    with pytest.raises(ValueError, match="spaces_between_special_tokens = False: this tokenizer puts spaces"):
        spaced.check(without)
    spaced.check(SamplingParams(spaces_between_special_tokens=False))  # they are left out of the text anyway
    spaced.check(SamplingParams(skip_special_tokens=False))
