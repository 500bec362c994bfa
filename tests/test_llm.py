import inspect
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from dist_vlm import LLM, SamplingParams
from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.fake import FakeExecutor, checksum_token
from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def with_image(seed=0, prompt="USER: <image>\nWhat? ASSISTANT:"):
    return {"prompt": prompt, "multi_modal_data": ImagePixelData(picture(seed))}


@pytest.fixture
def fake_llm(tiny_facts):
    """Builds LLMs over scripted ranks: everything but the model."""

    def make(**script):
        config = EngineConfig.from_fields(
            model=str(tiny_facts), device="cpu", executor="fake", max_model_len=128, max_num_seqs=4,
            max_num_batched_tokens=32,
        )  # fmt: skip
        return LLM.from_config(config, executor=FakeExecutor(num_blocks=64, **script))

    return make


def tokens_of(outputs):
    return [output.outputs[0].token_ids for output in outputs]


def scripted(output, count):
    tokens = list(output.prompt_token_ids)
    for _ in range(count):
        tokens.append(checksum_token(tokens, len(tokens)))
    return tokens[len(output.prompt_token_ids) :]


def test_the_signature_is_the_seeds():
    parameters = inspect.signature(LLM.__init__).parameters
    expected = {
        "tokenizer": None, "tokenizer_mode": "auto", "skip_tokenizer_init": False, "trust_remote_code": False,
        "tensor_parallel_size": 1, "dtype": "auto", "quantization": None, "revision": None,
        "tokenizer_revision": None, "seed": 0, "gpu_memory_utilization": 0.9, "swap_space": 4,
        "enforce_eager": False, "max_context_len_to_capture": None, "max_seq_len_to_capture": 8192,
        "disable_custom_all_reduce": False,
    }  # fmt: skip
    assert {name: parameters[name].default for name in expected} == expected
    assert list(parameters)[1:3] == ["model", "tokenizer"]
    assert list(inspect.signature(LLM.generate).parameters)[1:6] == [
        "prompts", "sampling_params", "prompt_token_ids", "use_tqdm", "lora_request",
    ]  # fmt: skip


def test_many_prompts_come_back_in_their_order(fake_llm):
    llm = fake_llm(staging_polls=3)
    prompts = [with_image(i) if i % 3 == 0 else f"prompt number {i}" for i in range(20)]
    outputs = llm.generate(prompts, GREEDY, use_tqdm=False)
    assert [output.request_id for output in outputs] == [str(i) for i in range(20)]
    assert tokens_of(outputs) == [scripted(output, 6) for output in outputs]
    assert {output.outputs[0].finish_reason for output in outputs} == {"length"}
    assert outputs[1].prompt == "prompt number 1"


def test_every_form_of_call(fake_llm):
    llm = fake_llm()
    ids = llm.get_tokenizer().encode("hello")
    forms = [
        llm.generate("hello", GREEDY, use_tqdm=False),
        llm.generate(["hello"], GREEDY, use_tqdm=False),
        llm.generate(prompts="hello", sampling_params=GREEDY, use_tqdm=False),
        llm.generate(inputs={"prompt": "hello"}, sampling_params=[GREEDY], use_tqdm=False),
        llm.generate({"prompt_token_ids": ids}, GREEDY, use_tqdm=False),
        llm.generate(prompt_token_ids=ids, sampling_params=GREEDY, use_tqdm=False),
        llm.generate(prompt_token_ids=[ids], sampling_params=GREEDY, use_tqdm=False),
        llm.generate({"prompt": "hello", "prompt_token_ids": ids}, GREEDY, use_tqdm=False),
    ]
    assert len({tuple(tokens_of(outputs)[0]) for outputs in forms}) == 1
    assert len(llm.generate(["a", "b"], use_tqdm=False)[1].outputs[0].token_ids) == 16, "SamplingParams() by default"


def test_a_wrong_call_is_named(fake_llm):
    llm = fake_llm()
    with pytest.raises(ValueError, match="0 of prompts, inputs and prompt_token_ids"):
        llm.generate()
    with pytest.raises(ValueError, match="2 of prompts, inputs and prompt_token_ids"):
        llm.generate("a", prompt_token_ids=[1])
    with pytest.raises(ValueError, match="sampling_params has 2 entries for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY])
    with pytest.raises(ValueError, match="lora_request"):
        llm.generate("a", lora_request=object())
    with pytest.raises(ValueError, match="only for embedding models"):
        llm.encode("a")


def bad_inputs():
    """Name, input, and what its error says."""
    cut = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(cut, "PNG")
    truncated = Image.open(io.BytesIO(cut.getvalue()[:1000]))
    return [
        ("too long", "word " * 300, "at most 127"),
        ("placeholder count", with_image(prompt="<image>" * 3), "3 image placeholders for 1 image"),
        ("no pixels", {"prompt": "<image>", "multi_modal_data": {"image": Image.new("RGB", (0, 0))}}, "no pixels"),
        (
            "200 million pixels",
            {"prompt": "<image>", "multi_modal_data": {"image": Image.new("1", (20_000, 10_000))}},
            "200000000 pixels; at most 67108864",
        ),
        ("truncated file", {"prompt": "<image>", "multi_modal_data": {"image": truncated}}, "damaged or truncated"),
        (
            "feature shape",
            {"prompt": "<image>", "multi_modal_data": ImageFeatureData(torch.ones(1, 16, 63))},
            r"shape \(1, 16, 63\); must be \(1, 16, 64\)",
        ),
        ("empty prompt", "", "prompt is empty"),
        ("half a surrogate", "bad \ud800", "half of a surrogate pair"),
        (
            "a line of pixels",
            {"prompt": "<image>", "multi_modal_data": {"image": Image.new("1", (1, 500_000))}},
            "500000 times longer than wide",
        ),
    ]


def test_bad_requests_fail_alone_by_name_and_the_others_tokens_are_unchanged(tiny_checkpoint, caplog):
    """Through the real model: the good prompts answer as they do in a run without the bad ones."""
    good = [with_image(i) for i in range(4)] + ["text alone"]
    bad = bad_inputs()
    with LLM(str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=128, max_num_seqs=4) as llm:
        quiet = tokens_of(llm.generate(good, GREEDY, use_tqdm=False))
        mixed: list = []
        for i, (_, inputs, _) in enumerate(bad):
            mixed += [inputs, *good[i : i + 1]]
        outputs = llm.generate(mixed, GREEDY, use_tqdm=False)
        again = tokens_of(llm.generate(good, GREEDY, use_tqdm=False))
    failed = [output for output in outputs if output.error is not None]
    assert len(failed) == len(bad)
    for output, (name, _, message) in zip(failed, bad, strict=True):
        assert output.finished, name
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].token_ids == []
        with pytest.raises(ValueError, match=message):
            raise ValueError(output.error)
        assert f"request {output.request_id} failed: {output.error}" in caplog.text
    assert [output.outputs[0].token_ids for output in outputs if output.error is None] == quiet
    assert again == quiet


def test_numbers_that_overflow_in_the_model_fail_their_request_alone(tiny_checkpoint):
    """Finite as given; the projector makes infinities of them, and of those come logits that are no numbers."""
    huge = {"prompt": "<image>", "multi_modal_data": ImageFeatureData(torch.full((1, 16, 64), 3e38))}
    with LLM(str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=128, max_num_seqs=4) as llm:
        quiet = tokens_of(llm.generate([with_image(1), "text"], GREEDY, use_tqdm=False))
        outputs = llm.generate([with_image(1), huge, "text"], GREEDY, use_tqdm=False)
        assert outputs[1].error == "the model's logits are not finite numbers"
        assert tokens_of([outputs[0], outputs[2]]) == quiet
        with pytest.raises(ValueError, match="logits are not finite"):
            llm.generate(huge, GREEDY, use_tqdm=False)
        assert tokens_of(llm.generate([with_image(1), "text"], GREEDY, use_tqdm=False)) == quiet


def test_extreme_sampling_values_reach_no_rank_unbounded(fake_llm):
    llm = fake_llm()
    for values in ({"top_k": 2**64}, {"temperature": 10**30}, {"top_p": 1e-30}):
        params = SamplingParams(max_tokens=2, ignore_eos=True, **values)
        (output,) = llm.generate(["hello"], params, use_tqdm=False)
        assert output.error is None
    spoilt = SamplingParams()
    spoilt.top_p = float("nan")
    with pytest.raises(ValueError, match="top_p = nan"):
        llm.generate("hello", spoilt, use_tqdm=False)


def test_what_nobody_foresaw_fails_its_request_alone(fake_llm, monkeypatch, caplog):
    llm = fake_llm()
    prepare = llm._front.processor.process

    def fail_some(request_id, inputs, params):
        if inputs == "bad":
            raise MemoryError("secret address 0x7f00")
        return prepare(request_id, inputs, params)

    monkeypatch.setattr(llm._front.processor, "process", fail_some)
    bad, good = llm.generate(["bad", "good"], GREEDY, use_tqdm=False)
    assert bad.error == "the request could not be prepared (MemoryError)"
    assert tokens_of([good]) == [scripted(good, 6)]
    assert "0x7f00" in caplog.text


def test_an_image_that_fails_on_the_ranks_raises_for_a_single_prompt_and_is_told_in_a_batch(fake_llm):
    key = fake_llm()._front.processor.process("x", with_image(5), GREEDY).request.images[0].span.image
    llm = fake_llm(fail_images={key: "the image could not be encoded"})
    with pytest.raises(ValueError, match="the request failed: the image could not be encoded"):
        llm.generate(with_image(5), GREEDY, use_tqdm=False)
    bad, good = llm.generate([with_image(5), with_image(6)], GREEDY, use_tqdm=False)
    assert (bad.error, good.error) == ("the image could not be encoded", None)
    assert tokens_of([good]) == [scripted(good, 6)]


def test_runs_may_interleave(fake_llm):
    llm = fake_llm()
    first = llm.stream("a", GREEDY)
    next(first)
    second = llm.generate(["b", "c"], GREEDY, use_tqdm=False)
    rest = list(first)
    assert tokens_of(second) == [scripted(output, 6) for output in second]
    assert rest[-1].finished
    assert rest[-1].outputs[0].token_ids == scripted(rest[-1], 6)
    assert not llm._news


def test_an_interrupt_ends_the_engine_by_name(fake_llm, monkeypatch):
    llm = fake_llm()

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(llm._core, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("a", GREEDY, use_tqdm=False)
    with pytest.raises(ExecutorError, match="broken off by KeyboardInterrupt"):
        llm.generate("a", GREEDY, use_tqdm=False)


def test_a_single_bad_prompt_raises(fake_llm):
    llm = fake_llm()
    for _, inputs, message in bad_inputs():
        with pytest.raises(ValueError, match=message):
            llm.generate(inputs, GREEDY, use_tqdm=False)
    assert tokens_of(llm.generate("hello", GREEDY, use_tqdm=False)), "the engine goes on"


def test_streaming_grows_and_leaving_early_aborts(fake_llm):
    llm = fake_llm()
    lengths = [len(output.outputs[0].token_ids) for output in llm.stream("hello", GREEDY)]
    assert lengths == [1, 2, 3, 4, 5, 6]
    for output in llm.stream(["a", "b"], SamplingParams(temperature=0, max_tokens=100)):
        if len(output.outputs[0].token_ids) == 3:
            break
    outputs = llm.generate(["c"], GREEDY, use_tqdm=False)
    assert tokens_of(outputs) == [scripted(outputs[0], 6)]
    assert llm.stats.num_scheduled_tokens < 100, "the two that were left did not run on"


def test_eos_ends_an_answer_unless_ignored(fake_llm):
    llm = fake_llm(next_token=lambda tokens, position: 2 if len(tokens) > 6 else 300)
    ids = [5] * 5
    params = SamplingParams(temperature=0, max_tokens=6)
    (output,) = llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)
    answer = output.outputs[0]
    assert (answer.token_ids, answer.finish_reason, answer.stop_reason) == ([300, 300, 2], "stop", None)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)
    assert output.outputs[0].token_ids == [300, 300, 2, 2, 2, 2]
    params = SamplingParams(temperature=0, max_tokens=6, stop_token_ids=[300])
    (output,) = llm.generate(prompt_token_ids=ids, sampling_params=params, use_tqdm=False)
    assert (output.outputs[0].token_ids, output.outputs[0].stop_reason) == ([300], 300)


def test_lost_ranks_end_the_engine(fake_llm):
    llm = fake_llm(fail_steps={3: ExecutorError("step", "the process ended", 1)})
    with pytest.raises(ExecutorError, match="rank 1"):
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    with pytest.raises(ExecutorError, match="rank 1"):
        llm.generate(["a"], GREEDY, use_tqdm=False)


def test_a_shut_down_llm_says_so(fake_llm):
    llm = fake_llm()
    llm.shutdown()
    llm.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        llm.generate("a", use_tqdm=False)


def test_what_an_llm_cannot_be_is_refused(tiny_facts):
    with pytest.raises(ValueError, match="disable_log_stats = False"):
        LLM(str(tiny_facts), disable_log_stats=False)
    with pytest.raises(ValueError, match="replicas = 2"):
        LLM.from_config(EngineConfig.from_fields(model=str(tiny_facts), replicas=2))
    with pytest.raises(ConfigError, match="quantization"):
        LLM(str(tiny_facts), quantization="awq")
    with pytest.raises(ConfigError, match="max_num_seqz"):
        LLM(str(tiny_facts), max_num_seqz=3)
    with pytest.raises(ValueError, match="no/such/dir"):
        LLM("no/such/dir")


def test_sampling_is_repeatable_with_a_seed_and_varies_without(tiny_checkpoint):
    params = SamplingParams(temperature=1.0, top_k=50, top_p=0.95, max_tokens=8, seed=3)
    free = SamplingParams(temperature=1.0, max_tokens=8)
    prompts = [with_image(i) for i in range(3)]
    with LLM(str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=128, max_num_seqs=8) as llm:
        first = tokens_of(llm.generate(prompts, params, use_tqdm=False))
        alone = [tokens_of(llm.generate(prompt, params, use_tqdm=False))[0] for prompt in prompts]
        drawn = {tuple(tokens_of(llm.generate(prompts[0], free, use_tqdm=False))[0]) for _ in range(4)}
    assert first == alone
    assert len(drawn) == 4


def test_an_llm_may_be_made_and_used_in_another_thread(fake_llm):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.extend(tokens_of(fake_llm().generate("a", GREEDY, use_tqdm=False)))
    )
    thread.start()
    thread.join()
    assert len(answers) == 1
