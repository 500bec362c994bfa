import itertools
import threading
import time
import types
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from dist_vlm.engine import offline_loop
from dist_vlm.engine.detokenizer import Detokenizer
from dist_vlm.engine.jobs import jobs_of
from dist_vlm.engine.offline_loop import OfflineLoop
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor, checksum_token
from dist_vlm.sampling import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


class _Owner:
    """Something whose end ends the core."""


class Rig:
    """A loop over scripted ranks of four slots."""

    def __init__(self, front, make_core, **script):
        self.executor = FakeExecutor(num_blocks=64, block_size=8, max_num_seqs=4, max_num_batched_tokens=64, **script)
        self.core = make_core(self.executor)
        self.core.start()
        self._owner = _Owner()
        ending = weakref.finalize(self._owner, self.core.shutdown)
        self.preparers = ThreadPoolExecutor(2)
        self.loop = OfflineLoop(self.core, front, max_num_seqs=4, preparers=self.preparers, ending=ending)

    def stream(self, prompts, params=GREEDY, priority=0, *, raise_errors=False):
        return self.loop.run(jobs_of(prompts, params, priority), raise_errors=raise_errors)

    def run(self, *args, **kwargs):
        """The last output of each request, by its id."""
        return {output.request_id: output for output in self.stream(*args, **kwargs)}

    def check_idle(self):
        assert self.core.request_ids == ()
        while self.core.has_work:  # the steps in flight
            assert self.core.step() == []
        self.core.scheduler.check()
        assert not self.loop._news


@pytest.fixture
def rig(front, make_core):
    return lambda **script: Rig(front, make_core, **script)


def scripted(output, count=6):
    tokens = list(output.prompt_token_ids)
    for _ in range(count):
        tokens.append(checksum_token(tokens, len(tokens)))
    return tokens[len(output.prompt_token_ids) :]


def tokens_of(output):
    return [answer.token_ids for answer in output.outputs]


def test_several_answers_are_one_output(rig):
    made = rig()
    params = SamplingParams(n=3, max_tokens=6, ignore_eos=True)
    outputs = made.run(["a", "b"], [params, GREEDY])
    assert list(outputs) == ["0", "1"] or list(outputs) == ["1", "0"]
    assert tokens_of(outputs["0"]) == [scripted(outputs["0"])] * 3
    assert tokens_of(outputs["1"]) == [scripted(outputs["1"])]
    new = [one for plan in made.executor.plans for one in plan.new]
    assert sorted((one.sampling.seed, one.sampling.sample_index) for one in new if one.sampling.temperature) == [
        (new[0].sampling.seed, index) for index in range(3)
    ]
    made.check_idle()


def test_only_ends_are_told_on_request(rig):
    made = rig()
    prompts, params = ["a", "b", "c"], [GREEDY, SamplingParams(n=2, max_tokens=9, ignore_eos=True), GREEDY]
    ends = list(made.loop.run(jobs_of(prompts, params, 0), raise_errors=False, only_ends=True))
    assert sorted(one.request_id for one in ends) == ["0", "1", "2"]
    assert all(one.finished for one in ends)
    grown = rig().run(prompts, params)
    assert {one.request_id: one.outputs for one in ends} == {key: one.outputs for key, one in grown.items()}
    made.check_idle()


def test_more_answers_than_slots(rig):
    made = rig()
    outputs = made.run(["a"], SamplingParams(n=20, max_tokens=6, ignore_eos=True))
    assert tokens_of(outputs["0"]) == [scripted(outputs["0"])] * 20
    made.check_idle()


def test_a_stop_string_ends_the_engine_request(rig, front):
    made = rig(next_token=lambda tokens, position: position)  # tokens 74, 75, ... in their order
    prompt = {"prompt_token_ids": [5] * 74}
    text = front.tokenizer.decode(list(range(74, 100)))
    stop = front.tokenizer.decode([78])
    params = SamplingParams(n=2, max_tokens=50, stop=[stop])
    output = made.run([prompt], params)["0"]
    assert tokens_of(output) == [[74, 75, 76, 77, 78]] * 2
    assert {answer.text for answer in output.outputs} == {text[: text.index(stop)]}
    assert {answer.stop_reason for answer in output.outputs} == {stop}
    made.check_idle()
    steps = len(made.executor.plans)
    assert steps < 12, "the engine did not run on to 50 tokens"


def test_an_answer_that_fails_ends_those_beside_it_and_no_other_request(rig):
    made = rig(fail_slots={(3, 1): "the slice failed"})
    outputs = made.run(["a", "b"], [SamplingParams(n=3, max_tokens=50, ignore_eos=True), GREEDY])
    assert outputs["0"].error == "the slice failed"
    assert [answer.finish_reason for answer in outputs["0"].outputs] == ["error"] * 3
    assert outputs["1"].error is None
    assert tokens_of(outputs["1"]) == [scripted(outputs["1"])]
    made.check_idle()
    with pytest.raises(ValueError, match="the request failed: the slice failed"):
        rig(fail_slots={(3, 1): "the slice failed"}).run("a", SamplingParams(n=3, max_tokens=50), raise_errors=True)


@pytest.mark.parametrize("depth_of_failure", ["first token", "later"])
def test_an_answer_that_cannot_be_detokenized_fails_alone(rig, monkeypatch, caplog, depth_of_failure):
    quiet = {key: tokens_of(output) for key, output in rig().run(["a", "b", "c"]).items()}
    made = rig()
    add, count = Detokenizer.add, itertools.count()

    def add_or_fail(self, token):
        if self._context[-1] == guilty and next(count) >= (0 if depth_of_failure == "first token" else 3):
            raise KeyError("secret text 0x7f00")
        return add(self, token)

    guilty = made.loop._front.tokenizer.encode("b")[-1]
    monkeypatch.setattr(Detokenizer, "add", add_or_fail)
    outputs = made.run(["a", "b", "c"], [GREEDY, SamplingParams(n=2, max_tokens=6, ignore_eos=True), GREEDY])
    assert outputs["1"].error == "the answer could not be detokenized (KeyError)"
    assert [answer.finish_reason for answer in outputs["1"].outputs] == ["error"] * 2
    assert {key: tokens_of(outputs[key]) for key in "02"} == {key: quiet[key] for key in "02"}
    assert "0x7f00" in caplog.text
    made.check_idle()
    with pytest.raises(ValueError, match=r"the request failed: the answer could not be detokenized \(KeyError\)"):
        made.run("b", raise_errors=True)
    made.check_idle()


def test_prompts_are_drawn_as_there_is_room_for_them(rig):
    made = rig()
    drawn = []

    def prompts():
        for number in range(100):
            drawn.append(number)
            yield f"prompt number {number}"

    ended = []
    for output in made.stream(prompts(), itertools.repeat(GREEDY)):
        assert len(drawn) - len(ended) <= 8, "two rounds of slots"
        if output.finished:
            ended.append(output)
    assert sorted(int(output.request_id) for output in ended) == list(range(100))
    assert all(output.prompt == f"prompt number {output.request_id}" for output in ended)
    assert all(tokens_of(output) == [scripted(output)] for output in ended)
    made.check_idle()


def test_prompts_that_fail_take_no_room(rig):
    made = rig()
    outputs = made.run(["", "word " * 300] * 40 + ["a"])
    assert sum(output.error is not None for output in outputs.values()) == 80
    assert tokens_of(outputs["80"]) == [scripted(outputs["80"])]


def test_an_iterable_that_raises_ends_its_run_alone(rig):
    made = rig()

    def prompts():
        yield "a"
        raise OSError("the file ended")

    other = made.stream("b", SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))
    next(other)
    with pytest.raises(OSError, match="the file ended"):
        made.run(prompts())
    last = list(other)[-1]
    assert tokens_of(last) == [scripted(last, 20)]
    made.check_idle()


def test_priorities_decide_who_runs_first(rig):
    made = rig()
    order = [output.request_id for output in made.stream(["x"] * 8, GREEDY, [5] * 4 + [-5] * 4) if output.finished]
    assert set(order[:4]) == {"4", "5", "6", "7"}
    outputs = made.run(["a", "b"], GREEDY, [0, 2**31])
    assert outputs["9"].error.startswith("priority = 2147483648: must be an integer")
    assert outputs["8"].error is None


def test_runs_may_interleave_and_what_one_aborts_is_told_to_none(rig, front):
    made = rig(next_token=lambda tokens, position: position)
    stop = front.tokenizer.decode([79])
    first = made.stream([{"prompt_token_ids": [5] * 74}], SamplingParams(n=3, max_tokens=40, stop=[stop]))
    next(first)
    second = made.run(["b", "c"], SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
    rest = list(first)
    assert tokens_of(rest[-1]) == [[74, 75, 76, 77, 78, 79]] * 3
    assert all(len(tokens_of(output)[0]) == 30 for output in second.values())
    made.check_idle()


def test_leaving_early_aborts_every_answer(rig):
    made = rig()
    params = SamplingParams(n=3, max_tokens=100, ignore_eos=True)
    for output in made.stream(["a", "b"], params):
        if len(output.outputs[2].token_ids) == 3:
            break
    made.loop.run(iter(()), raise_errors=False).close()
    assert made.core.request_ids == ()
    assert made.core.stats.num_scheduled_tokens < 100


def test_a_request_that_the_engine_takes_in_part_is_taken_back(rig, monkeypatch):
    made = rig()
    add = made.core.add

    def add_two(request):
        if request.request_id == "0/2":
            raise ValueError("the engine is full")
        add(request)

    monkeypatch.setattr(made.core, "add", add_two)
    outputs = made.run(["a", "b"], [SamplingParams(n=4, max_tokens=50), GREEDY])
    assert outputs["0"].error == "the engine is full"
    assert tokens_of(outputs["1"]) == [scripted(outputs["1"])]
    made.check_idle()


@pytest.mark.parametrize("end", ["last token", "left early", "refused"])
def test_logits_processors_are_known_as_long_as_their_request(rig, monkeypatch, end):
    made = rig()
    monkeypatch.setattr(made.loop._front.processor._sampling, "_serves_logits_processors", True)
    known = {}

    def set_processors(name, processors):
        if processors is None:
            del known[name]
        else:
            known[name] = processors

    monkeypatch.setattr(made.core, "set_processors", set_processors)

    def same(tokens, logits):
        return logits

    params = SamplingParams(n=2, max_tokens=6, ignore_eos=True, logits_processors=[same])
    if end == "refused":
        monkeypatch.setattr(made.core, "add", lambda request: (_ for _ in ()).throw(ValueError("full")))
        assert made.run(["a"], params)["0"].error == "full"
    else:
        stream = made.stream(["a"], params)
        next(stream)
        assert known == {"0": (same,)}
        assert {one.sampling.processors for plan in made.executor.plans for one in plan.new} == {"0"}
        if end == "left early":
            stream.close()
        else:
            list(stream)
    assert known == {}


def test_an_interrupt_ends_the_engine_by_name(rig, monkeypatch):
    made = rig()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(made.core, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        made.run("a")
    with pytest.raises(ExecutorError, match="broken off by KeyboardInterrupt"):
        made.run("a")


def test_lost_ranks_end_the_engine(rig):
    made = rig(fail_steps={3: ExecutorError("step", "the process ended", 1)})
    for _ in range(2):
        with pytest.raises(ExecutorError, match="rank 1"):
            made.run(["a", "b"])


# ---------------------------------------------------------------------------------------------------------- pictures


def with_picture(seed):
    noise = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return {"prompt": "<image>", "multi_modal_data": {"image": Image.fromarray(noise)}}


@pytest.fixture
def hold(monkeypatch):
    """Keeps requests from being prepared: by their ids, each until its event is set, or for some seconds."""

    def hold(made, until):
        process = made.loop._front.processor.process

        def held(request_id, *args, **more):
            wait = until.get(request_id)
            if isinstance(wait, threading.Event):
                assert wait.wait(10), request_id
            elif wait:
                time.sleep(wait)
            return process(request_id, *args, **more)

        monkeypatch.setattr(made.loop._front.processor, "process", held)

    return hold


def test_requests_run_while_later_pictures_are_prepared(rig, hold):
    made, ended = rig(staging_polls=2), threading.Event()
    hold(made, {"2": ended, "3": ended})
    order = []
    for output in made.stream([with_picture(i) for i in range(4)]):
        if output.finished:
            order.append(output.request_id)
            assert tokens_of(output) == [scripted(output)]
        if set(order) == {"0", "1"}:
            ended.set()
    assert sorted(order[:2]) == ["0", "1"]
    assert sorted(order) == ["0", "1", "2", "3"]
    made.check_idle()


def test_requests_come_to_the_engine_in_their_order_however_long_each_takes(rig, hold, monkeypatch):
    prompts = [with_picture(i) if i % 3 else f"prompt number {i}" for i in range(24)]
    quiet = {key: tokens_of(output) for key, output in rig().run(prompts).items()}
    made = rig()
    hold(made, {str(i): 0.004 * (i * 7 % 5) for i in range(24)})
    add, added = made.core.add, []
    monkeypatch.setattr(made.core, "add", lambda request: (added.append(request.request_id), add(request)))
    assert {key: tokens_of(output) for key, output in made.run(prompts).items()} == quiet
    assert added == [str(i) for i in range(24)]
    made.check_idle()


def test_pictures_are_drawn_as_there_is_room_for_them(rig):
    made, drawn, ended = rig(), [], []

    def prompts():
        for number in range(40):
            drawn.append(number)
            yield with_picture(number)

    for output in made.stream(prompts()):
        assert len(drawn) - len(ended) <= 8, "two rounds of slots"
        if output.finished:
            ended.append(output.request_id)
    assert len(ended) == 40
    made.check_idle()


def test_a_picture_that_fails_is_told_in_its_turn(rig, monkeypatch):
    made = rig()
    broken = with_picture(1)
    broken["multi_modal_data"]["image"] = Image.new("RGB", (0, 0))
    outputs = made.run([with_picture(0), broken, with_picture(2)])
    assert [outputs[key].error is None for key in "012"] == [True, False, True]
    assert "has no pixels" in outputs["1"].error
    with pytest.raises(ValueError, match="has no pixels"):
        made.run(broken, raise_errors=True)
    made.check_idle()


def test_leaving_early_gives_up_what_is_being_prepared(rig, hold):
    made, left = rig(), threading.Event()
    hold(made, {str(i): left for i in range(1, 8)})
    stream = made.stream([with_picture(i) for i in range(8)])
    next(stream)
    stream.close()
    left.set()
    made.check_idle()
    assert tokens_of(made.run([with_picture(9)])["8"])
    made.preparers.shutdown()


def test_a_shutdown_while_a_picture_is_waited_for_says_so(rig, hold):
    made, shut_down = rig(), threading.Event()
    hold(made, {"0": shut_down, "1": shut_down})

    def end():
        made.preparers.shutdown(wait=False, cancel_futures=True)
        made.loop._ending()
        shut_down.set()

    alarm = threading.Timer(0.1, end)
    alarm.start()
    with pytest.raises(RuntimeError, match="this LLM is shut down"):
        made.run([with_picture(i) for i in range(8)])
    alarm.join()


@pytest.mark.parametrize(("step_s", "expected"), [(0.004, 1), (0.1, 13), (1.0, 16)])
def test_letting_requests_in_takes_a_quarter_of_a_step(rig, monkeypatch, step_s, expected):
    """Each takes 2 ms here. The first 16 find nothing that they could hold up."""
    made, clock, let_in = rig(), [0.0], [0]
    made.loop._max_num_seqs = 40
    monkeypatch.setattr(offline_loop, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    add, step = made.core.add, made.core.step

    def slow_add(request):
        clock[0] += 0.002
        let_in[-1] += 1
        add(request)

    def slow_step():
        clock[0] += step_s
        let_in.append(0)
        return step()

    monkeypatch.setattr(made.core, "add", slow_add)
    monkeypatch.setattr(made.core, "step", slow_step)
    outputs = made.run(["a"] * 60, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True))
    assert len(outputs) == 60
    assert let_in[0] == 16
    assert let_in[1:3] == [expected] * 2
