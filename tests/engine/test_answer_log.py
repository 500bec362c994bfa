import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_vlm.engine.answer_log import AnswerLog
from dist_vlm.engine.logprobs_view import TokenTexts
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.stop_strings import StopStrings
from dist_vlm.outputs import CompletionOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers.plan import TokenLogprobs

EOS = 2
HIEROGLYPH = "\U00013000"  # four bytes, which no tokenizer trained on program text has whole


@pytest.fixture(scope="module")
def encode(front):
    return lambda text: front.tokenizer.encode(text, add_special_tokens=False)


def log(front, *, only_end=False, **params):
    values = SamplingParams(**params)
    return AnswerLog(
        CompletionOutput(index=0, text="", token_ids=[]),
        values,
        prompt_token_ids=[1, 67],
        tokenizer=front.tokenizer,
        texts=TokenTexts(front.tokenizer) if values.detokenize else None,
        watch=StopStrings(values.stop).watch(),
        eos_token_ids=(EOS,),
        only_end=only_end,
    )


def fed(one, tokens, *, per_step=1, finish="length", stop_reason=None):
    """Feeds the tokens until the answer ends; returns the texts shown, and whether the engine must abort."""
    shown = []
    parts = [tokens[start : start + per_step] for start in range(0, len(tokens), per_step)]
    for index, part in enumerate(parts):
        is_last = index == len(parts) - 1
        news = EngineOutput("7", tuple(part), finish_reason=finish if is_last else None, stop_reason=stop_reason)
        must_abort = one.take(news)
        shown.append(one.answer.text)
        if one.answer.finished():
            return shown, must_abort
    return shown, False


def characters(encode, text):
    """One token a character, so that strings lie across tokens."""
    return list(itertools.chain.from_iterable(encode(char) for char in text))


def test_a_stop_string_across_tokens_cuts_the_text_and_ends_the_answer(front, encode):
    tokens = characters(encode, "one END two")
    one = log(front, stop=["END"])
    shown, must_abort = fed(one, tokens)
    answer = one.answer
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("one ", "stop", "END")
    assert answer.token_ids == tokens[:7], "up to and including the token that completes it"
    assert must_abort
    assert shown == ["o", "on", "one", "one ", "one ", "one ", "one "]


def test_the_stop_string_is_kept_on_request(front, encode):
    one = log(front, stop=["END"], include_stop_str_in_output=True)
    fed(one, encode("one ENDING"), per_step=99)
    assert (one.answer.text, one.answer.stop_reason) == ("one END", "END")


def test_what_may_begin_a_stop_string_is_held_until_it_is_decided(front, encode):
    tokens = characters(encode, "an ENcore EN")
    one = log(front, stop=["END", "ENormous"])
    shown, must_abort = fed(one, tokens)
    held = ["an ", "an ", "an ", "an ENc"]
    assert shown[2:6] == held
    assert shown[-1] == "an ENcore EN", "the end releases it"
    assert shown[-2] == "an ENcore "
    assert (one.answer.finish_reason, one.answer.stop_reason, must_abort) == ("length", None, False)


TEXT = st.text(st.sampled_from(["a", "b", "é", " ", HIEROGLYPH, "\ufffd"]), max_size=14)


@settings(max_examples=150, deadline=None)
@given(
    text=TEXT,
    strings=st.lists(TEXT.filter(bool), max_size=4, unique=True),
    include=st.booleans(),
    min_tokens=st.integers(0, 6),
    per_step=st.integers(1, 4),
)
def test_any_stop_string_in_any_text(front, encode, text, strings, include, min_tokens, per_step):
    tokens = encode(text)
    if not tokens:
        return
    one = log(front, stop=strings, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=None)
    shown, must_abort = fed(one, tokens, per_step=per_step)
    expected, used, reason = text, len(tokens), None
    for count in range(1, len(tokens) + 1):
        # A character counts from the token on that completes it; what holds the place of one, from the next on.
        known = front.tokenizer.decode(tokens[:count])
        before = front.tokenizer.decode(tokens[: count - 1]).rstrip("\ufffd")
        known = known if count == len(tokens) else known.rstrip("\ufffd")
        ends = range(len(before) + 1, len(known) + 1) if count >= min_tokens else ()
        met = [(end, string) for end in ends for string in strings if known[:end].endswith(string)]
        if met:
            end = met[0][0]
            reason = max((string for other, string in met if other == end), key=len)
            expected, used = known[: end if include else end - len(reason)], count
            break
    assert (one.answer.text, one.answer.token_ids, one.answer.stop_reason) == (expected, tokens[:used], reason)
    assert one.answer.finish_reason == ("stop" if reason else "length")
    assert must_abort == (reason is not None and -(-used // per_step) * per_step < len(tokens))
    assert all(expected.startswith(part) for part in shown), "what was shown stays"


def test_stop_strings_do_not_count_before_min_tokens(front, encode):
    tokens = characters(encode, "a.b.c")
    one = log(front, stop=["."], min_tokens=3)
    fed(one, tokens)
    assert (one.answer.text, one.answer.token_ids) == ("a.b", tokens[:4])
    exact = log(front, stop=["."], min_tokens=2)
    fed(exact, tokens)
    assert exact.answer.text == "a"


@pytest.mark.parametrize(("stop_reason", "told"), [(EOS, None), (74, 74)])
def test_a_stop_token_has_no_text_unless_asked_for(front, encode, stop_reason, told):
    tokens = [*encode("done"), stop_reason]
    text = front.tokenizer.decode([stop_reason], skip_special_tokens=False)
    for include, expected in ((False, "done"), (True, f"done{text}")):
        one = log(front, include_stop_str_in_output=include, skip_special_tokens=False)
        fed(one, tokens, finish="stop", stop_reason=stop_reason)
        answer = one.answer
        assert (answer.text, answer.token_ids) == (expected, tokens)
        assert (answer.finish_reason, answer.stop_reason) == ("stop", told)


def test_a_stop_token_that_completes_a_stop_string_has_ended_the_answer_itself(front, encode):
    one = log(front, stop=["</s>"], include_stop_str_in_output=True, skip_special_tokens=False)
    fed(one, [*encode("done"), EOS], finish="stop", stop_reason=EOS)
    assert (one.answer.text, one.answer.finish_reason, one.answer.stop_reason) == ("done</s>", "stop", None)


@settings(max_examples=40, deadline=None)
@given(text=st.text(st.sampled_from(f"ab .é{HIEROGLYPH}"), min_size=1, max_size=12), per_step=st.integers(1, 3))
def test_an_answer_looked_at_only_at_its_end_has_the_text_of_one_that_grew(front, encode, text, per_step):
    tokens = encode(text)
    tokens = tokens[: len(tokens) - len(tokens) % 2]  # half a character at the end, at times
    if not tokens:
        return
    late, grown = log(front, only_end=True), log(front)
    shown, must_abort = fed(late, tokens, per_step=per_step)
    fed(grown, tokens, per_step=per_step)
    assert late.answer == grown.answer
    assert set(shown[:-1]) <= {""} and not must_abort


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_token_of_an_answer_looked_at_only_at_its_end(front, encode, include):
    params = {"include_stop_str_in_output": include, "skip_special_tokens": False}
    late, grown = log(front, only_end=True, **params), log(front, **params)
    for one in (late, grown):
        fed(one, [*encode("done"), EOS], finish="stop", stop_reason=EOS)
    assert late.answer == grown.answer
    assert late.answer.text == ("done</s>" if include else "done")


def test_a_stop_string_ends_an_answer_looked_at_only_at_its_end_as_soon_as_it_comes(front, encode):
    one = log(front, only_end=True, stop=["b"])
    _, must_abort = fed(one, characters(encode, "abcd"))
    assert (one.answer.text, one.answer.stop_reason, must_abort) == ("a", "b", True)


def test_an_answer_looked_at_only_at_its_end_has_its_log_probabilities(front, encode):
    tokens = characters(encode, "ab")
    one = log(front, only_end=True, logprobs=0)
    for token in tokens:
        one.take(EngineOutput("7", (token,), logprobs=(TokenLogprobs(-0.5, 1),)))
    one.take(EngineOutput("7", finish_reason="abort"))
    assert (one.answer.text, one.answer.token_ids, one.answer.cumulative_logprob) == ("ab", tokens, -1.0)
    assert [list(view) for view in one.answer.logprobs] == [[token] for token in tokens]


def test_a_stop_string_in_the_last_token_allowed_is_found(front, encode):
    one = log(front, stop=["e"])
    _, must_abort = fed(one, characters(encode, "done"))
    assert (one.answer.text, one.answer.finish_reason, one.answer.stop_reason) == ("don", "stop", "e")
    assert not must_abort, "the engine has ended it too"


def test_log_probabilities_follow_the_tokens_and_are_cut_with_them(front, encode):
    tokens = characters(encode, "ab.cd")
    entries = tuple(
        TokenLogprobs(-0.5 * (i + 1), 1, (token, 5), (-0.5 * (i + 1), -7.0)) for i, token in enumerate(tokens)
    )
    one = log(front, stop=["."], logprobs=1)
    one.take(EngineOutput("7", tuple(tokens), logprobs=entries))
    assert [list(view) for view in one.answer.logprobs] == [[token] for token in tokens[:3]]
    assert [view[token].decoded_token for view, token in zip(one.answer.logprobs, tokens, strict=False)] == [
        "a",
        "b",
        ".",
    ]
    assert one.answer.cumulative_logprob == pytest.approx(-0.5 - 1.0 - 1.5)


def test_log_probabilities_watched_to_rank_by_are_summed_and_not_shown(front):
    one = log(front, best_of=2)
    one.take(EngineOutput("7", (5, 6), logprobs=(TokenLogprobs(-0.5, 1), TokenLogprobs(-0.25, 1))))
    assert (one.answer.logprobs, one.answer.cumulative_logprob) == (None, -0.75)
    assert log(front).answer.cumulative_logprob is None


def test_without_detokenizing_there_are_no_texts(front):
    one = log(front, detokenize=False, logprobs=1)
    one.take(EngineOutput("7", (5,), logprobs=(TokenLogprobs(-0.5, 1, (5,), (-0.5,)),), finish_reason="length"))
    assert (one.answer.text, one.answer.token_ids) == ("", [5])
    assert one.answer.logprobs[0][5].decoded_token is None


def test_news_of_an_answer_that_has_ended_are_ignored(front, encode):
    one = log(front, stop=["."])
    one.take(EngineOutput("7", tuple(encode("a."))))
    assert not one.take(EngineOutput("7", tuple(encode("bc")), finish_reason="length"))
    one.end("error", "another answer failed")
    assert (one.answer.text, one.answer.finish_reason, one.answer.stop_reason) == ("a", "stop", ".")
