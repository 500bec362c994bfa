from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.request_log import RequestLog
from dist_vlm.sampling import SamplingParams


def log(front, **params):
    values = SamplingParams(temperature=0, **params)
    processed = front.processor.process("7", {"prompt": "hello"}, values)
    return RequestLog(processed, values, tokenizer=front.tokenizer, eos_token_ids=front.spec.eos_token_ids)


def test_an_answer_grows_and_ends(front):
    growing = log(front)
    tokens = front.tokenizer.encode("a good answer", add_special_tokens=False)
    arrived = growing.output.metrics.arrival_time
    output = growing.take(EngineOutput("7", tuple(tokens[:1]), first_scheduled_time=arrived))
    assert (output.prompt, output.finished, output.outputs[0].finished()) == ("hello", False, False)
    first = output.metrics.first_token_time
    output = growing.take(EngineOutput("7", (*tokens[1:], 2), finish_reason="stop", stop_reason=2))
    answer = output.outputs[0]
    assert (answer.text, answer.token_ids) == ("a good answer", [*tokens, 2])
    # The end-of-sequence token is no stop reason, as in the seed.
    assert (answer.finish_reason, answer.stop_reason) == ("stop", None)
    metrics = output.metrics
    assert metrics.first_token_time == first
    assert metrics.arrival_time <= first <= metrics.last_token_time <= metrics.finished_time
    assert metrics.time_in_queue == 0.0


def test_a_stop_token_of_the_clients_is_named(front):
    output = log(front).take(EngineOutput("7", (9,), finish_reason="stop", stop_reason=9))
    assert output.outputs[0].stop_reason == 9


def test_an_error_is_told(front):
    output = log(front).take(EngineOutput("7", finish_reason="error", stop_reason="the image could not be encoded"))
    assert output.finished
    assert output.error == "the image could not be encoded"
    assert output.outputs[0].finish_reason == "error"


def test_without_detokenizing_there_is_no_text(front):
    output = log(front, detokenize=False).take(EngineOutput("7", (5, 6), finish_reason="length"))
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("", [5, 6])
