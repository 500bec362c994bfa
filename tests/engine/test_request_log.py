import itertools

import pytest

from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.request_log import RequestLog
from dist_vlm.outputs import Logprob
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers.plan import TokenLogprobs


def log(front, inputs="hello", **params):
    values = SamplingParams(**{"temperature": 0, **params})
    processed = front.processor.process("7", inputs, values)
    return RequestLog(processed, values, tokenizer=front.tokenizer, eos_token_ids=front.spec.eos_token_ids)


def scored(request_id, tokens, logprob, **news):
    return EngineOutput(request_id, tuple(tokens), tuple(TokenLogprobs(logprob, 1) for _ in tokens), **news)


def test_an_answer_grows_and_ends(front):
    growing = log(front, {"prompt": "hello"})
    tokens = front.tokenizer.encode("a good answer", add_special_tokens=False)
    assert growing.request_ids == ("7",)
    arrived = growing.output.metrics.arrival_time
    output = growing.take(EngineOutput("7", tuple(tokens[:1]), first_scheduled_time=arrived))
    assert (output.prompt, output.finished, output.outputs[0].finished()) == ("hello", False, False)
    first = output.metrics.first_token_time
    output = growing.take(EngineOutput("7", (*tokens[1:], 2), finish_reason="stop", stop_reason=2))
    answer = output.outputs[0]
    assert (answer.text, answer.token_ids) == ("a good answer", [*tokens, 2])
    # The end-of-sequence token is no stop reason, as in the seed.
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    assert (output.finished, output.error, growing.pop_unwanted()) == (True, None, [])
    metrics = output.metrics
    assert metrics.first_token_time == first
    assert metrics.arrival_time <= first <= metrics.last_token_time <= metrics.finished_time
    assert metrics.time_in_queue == 0.0


def test_a_stop_token_of_the_clients_is_named(front):
    output = log(front).take(EngineOutput("7", (9,), finish_reason="stop", stop_reason=9))
    assert output.outputs[0].stop_reason == 9


def test_an_error_is_told(front):
    failing = log(front)
    output = failing.take(EngineOutput("7", finish_reason="error", stop_reason="the image could not be encoded"))
    assert output.finished
    assert output.error == "the image could not be encoded"
    assert output.outputs[0].finish_reason == "error"
    assert failing.pop_unwanted() == []


def test_without_detokenizing_there_is_no_text(front):
    output = log(front, detokenize=False).take(EngineOutput("7", (5, 6), finish_reason="length"))
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [5, 6])


def test_a_stop_string_ends_the_request_and_its_engine_request_is_unwanted(front):
    one = log(front, stop="good")
    tokens = front.tokenizer.encode("a good answer", add_special_tokens=False)
    output = one.take(EngineOutput("7", tuple(tokens)))
    assert (output.finished, output.outputs[0].text) == (True, "a ")
    assert one.pop_unwanted() == ["7"]
    assert one.pop_unwanted() == [], "told once"
    late = one.take(EngineOutput("7", (5,), finish_reason="abort"))
    assert (late.outputs[0].text, late.outputs[0].finish_reason) == ("a ", "stop")


def test_several_answers_grow_each_by_its_own_news(front):
    one = log(front, temperature=1, n=3, stop=["."])
    assert one.request_ids == ("7/0", "7/1", "7/2")
    dot = front.tokenizer.encode(".", add_special_tokens=False)[0]
    one.take(EngineOutput("7/2", (74,), num_preemptions=1))
    one.take(EngineOutput("7/0", (75, dot), num_preemptions=2))
    assert one.pop_unwanted() == ["7/0"]
    one.take(EngineOutput("7/1", (76,), finish_reason="length"))
    output = one.take(EngineOutput("7/2", (77,), num_preemptions=3))
    assert not output.finished
    output = one.take(EngineOutput("7/2", (2,), num_preemptions=3, finish_reason="stop", stop_reason=2))
    assert output.finished
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert [answer.token_ids for answer in output.outputs] == [[75, dot], [76], [74, 77, 2]]
    assert [answer.finish_reason for answer in output.outputs] == ["stop", "length", "stop"]
    assert output.num_preemptions == 5
    assert (output.request_id, one.pop_unwanted()) == ("7", [])


def test_the_failure_of_one_answer_ends_them_all(front):
    one = log(front, temperature=1, n=4, stop=["."])
    dot = front.tokenizer.encode(".", add_special_tokens=False)[0]
    one.take(EngineOutput("7/0", (5,), finish_reason="length"))
    one.take(EngineOutput("7/3", (dot,)))
    assert one.pop_unwanted() == ["7/3"]
    output = one.take(EngineOutput("7/1", finish_reason="error", stop_reason="the slice failed"))
    assert (output.finished, output.error) == (True, "the slice failed")
    assert [answer.finish_reason for answer in output.outputs] == ["length", "error", "error", "stop"]
    assert one.pop_unwanted() == ["7/2"], "what the engine has ended, or was told to, is not aborted again"
    assert one.take(EngineOutput("7/2", (5,))).outputs[2].token_ids == []


def test_fail_ends_a_request_once(front):
    one = log(front, temperature=1, n=2)
    one.take(EngineOutput("7/0", (5,), finish_reason="length"))
    output = one.fail("the answer could not be detokenized (KeyError)")
    assert (output.finished, output.error) == (True, "the answer could not be detokenized (KeyError)")
    assert one.pop_unwanted() == ["7/1"]
    assert one.fail("again").error == "the answer could not be detokenized (KeyError)"


def test_an_aborted_request_ends_with_its_last_answer(front):
    one = log(front, temperature=1, n=2)
    assert not one.take(EngineOutput("7/0", finish_reason="abort")).finished
    output = one.take(EngineOutput("7/1", finish_reason="abort"))
    assert (output.finished, output.error) == (True, None)
    assert [answer.finish_reason for answer in output.outputs] == ["abort", "abort"]


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_the_best_n_come_in_the_order_of_their_log_probabilities(front, order):
    """The mean is not what counts: the last candidate has the highest for each token, and three of them."""
    one = log(front, temperature=1, n=2, best_of=4)
    candidates = [([10], -2.0), ([11, 12], -0.5), ([13], -0.75), ([14, 15, 16], -0.4)]
    for index in order:
        tokens, logprob = candidates[index]
        output = one.take(scored(f"7/{index}", tokens[:1], logprob))
        assert [(answer.token_ids, answer.text) for answer in output.outputs] == [([], ""), ([], "")]
        assert not output.finished
        output = one.take(scored(f"7/{index}", tokens[1:], logprob, finish_reason="length"))
    assert output.finished
    assert [answer.token_ids for answer in output.outputs] == [[13], [11, 12]]
    assert [answer.index for answer in output.outputs] == [0, 1]
    assert [answer.cumulative_logprob for answer in output.outputs] == [-0.75, -1.0]
    assert [answer.logprobs for answer in output.outputs] == [None, None]


def test_equally_likely_candidates_keep_their_order_and_the_aborted_come_last(front):
    one = log(front, temperature=1, n=3, best_of=4)
    one.take(scored("7/0", [10], -0.1, finish_reason="abort"))
    for index in (3, 1, 2):
        output = one.take(scored(f"7/{index}", [10 + index], -1.0, finish_reason="length"))
    assert [answer.token_ids for answer in output.outputs] == [[11], [12], [13]]


def test_prompt_log_probabilities_have_an_entry_for_every_token(front):
    one = log(front, {"prompt_token_ids": [1, 74, 75, 76]}, temperature=1, n=2, prompt_logprobs=1)
    assert one.output.prompt_logprobs == [None]
    entries = [TokenLogprobs(-float(place), place, (5,), (-0.5,)) for place in (2, 3, 4)]
    one.take(EngineOutput("7/0", prompt_logprobs=tuple(entries[:2]), num_cached_tokens=1))
    output = one.take(EngineOutput("7/0", (9,), prompt_logprobs=tuple(entries[2:]), num_cached_tokens=1))
    one.take(EngineOutput("7/1", (9,), num_cached_tokens=3))
    text = front.tokenizer.decode
    assert output.prompt_logprobs == [
        None,
        *(
            {token: Logprob(-float(place), place, text([token])), 5: Logprob(-0.5, 1, text([5]))}
            for token, place in ((74, 2), (75, 3), (76, 4))
        ),
    ]
    assert output.num_cached_tokens == 1, "the first answer's: the others find what it computed"


def test_what_the_caller_does_to_its_parameters_afterwards_changes_nothing(front):
    values = SamplingParams(temperature=0, stop=["."])
    processed = front.processor.process("7", "hello", values)
    one = RequestLog(processed, values, tokenizer=front.tokenizer, eos_token_ids=front.spec.eos_token_ids)
    values.stop, values.include_stop_str_in_output, values.detokenize = ["o"], True, False
    output = one.take(EngineOutput("7", tuple(front.tokenizer.encode("so. it is", add_special_tokens=False))))
    assert output.outputs[0].text == "so"


def test_logits_processors_are_kept_with_their_name(front):
    def forbid(tokens, logits):
        return logits

    assert (log(front).processors_name, log(front).processors) == ("", ())
    values = SamplingParams(logits_processors=[forbid])
    front.processor._sampling._serves_logits_processors = True
    try:
        processed = front.processor.process("7", "hello", values)
    finally:
        front.processor._sampling._serves_logits_processors = False
    one = RequestLog(processed, values, tokenizer=front.tokenizer, eos_token_ids=())
    assert (one.processors_name, one.processors) == ("7", (forbid,))
