import inspect
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration, LogitsProcessor, LogitsProcessorList

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


def test_ranks_that_are_lost_while_a_request_is_taken_in_end_the_engine(fake_llm) -> None:
    picture = Image.fromarray(np.zeros((60, 80, 3), np.uint8))
    inputs = {"prompt": "USER: <image>\nWhat? ASSISTANT:", "multi_modal_data": {"image": picture}}
    llm = fake_llm()
    llm._core._executor.lose(ExecutorError("step", "its process died", 1))
    with pytest.raises(ExecutorError, match=r"\(rank 1\): its process died"):
        llm.generate(inputs, use_tqdm=False)
    assert llm._loop._dead is not None
    with pytest.raises(ExecutorError, match=r"\(rank 1\): its process died"):
        llm.generate("hello", use_tqdm=False)


def test_lost_ranks_are_replaced_amid_a_call(fake_llm) -> None:
    prompts = [f"prompt {number}" for number in range(9)]
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = fake_llm().generate(prompts, params, use_tqdm=False)
    llm = fake_llm(restarts=1, fail_steps={5: ExecutorError("step", "its process died", 1)})
    assert tokens_of(llm.generate(prompts, params, use_tqdm=False)) == tokens_of(expected)
    assert llm._core.state().num_restarts == 1


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
    with pytest.raises(ValueError, match="priority has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], GREEDY, priority=[1])
    with pytest.raises(ValueError, match="priority = 'high': must be an integer"):
        llm.generate("a", GREEDY, priority="high")
    with pytest.raises(ValueError, match="logits_processors: served only with executor='inline'"):
        llm.generate("a", SamplingParams(logits_processors=[len]))
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
    """Finite as given; the projector makes infinities of them."""
    huge = {"prompt": "<image>", "multi_modal_data": ImageFeatureData(torch.full((1, 16, 64), 3e38))}
    with LLM(str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=128, max_num_seqs=4) as llm:
        quiet = tokens_of(llm.generate([with_image(1), "text"], GREEDY, use_tqdm=False))
        outputs = llm.generate([with_image(1), huge, "text"], GREEDY, use_tqdm=False)
        assert outputs[1].error == "the image's features are not finite numbers"
        assert tokens_of([outputs[0], outputs[2]]) == quiet
        with pytest.raises(ValueError, match="features are not finite"):
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

    def fail_some(request_id, inputs, params, *, priority, helpers):
        if inputs == "bad":
            raise MemoryError("secret address 0x7f00")
        return prepare(request_id, inputs, params, priority=priority, helpers=helpers)

    monkeypatch.setattr(llm._front.processor, "process", fail_some)
    bad, good = llm.generate(["bad", "good"], GREEDY, use_tqdm=False)
    assert bad.error == "the request could not be prepared (MemoryError)"
    assert tokens_of([good]) == [scripted(good, 6)]
    assert "0x7f00" in caplog.text


def test_an_image_that_fails_on_the_ranks_raises_for_a_single_prompt_and_is_told_in_a_batch(fake_llm):
    (request,) = fake_llm()._front.processor.process("x", with_image(5), GREEDY).requests
    key = request.images[0].span.image
    llm = fake_llm(fail_images={key: "the image could not be encoded"})
    with pytest.raises(ValueError, match="the request failed: the image could not be encoded"):
        llm.generate(with_image(5), GREEDY, use_tqdm=False)
    bad, good = llm.generate([with_image(5), with_image(6)], GREEDY, use_tqdm=False)
    assert (bad.error, good.error) == ("the image could not be encoded", None)
    assert tokens_of([good]) == [scripted(good, 6)]


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
    with pytest.raises(ValueError, match="engine_process = True.*use AsyncLLM"):
        LLM.from_config(EngineConfig.from_fields(model=str(tiny_facts), engine_process=True))
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


@pytest.fixture(scope="module")
def tiny_llm(tiny_checkpoint):
    with LLM(
        str(tiny_checkpoint), executor="inline", device="cpu", max_model_len=128, max_num_seqs=8, max_logprobs=5
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """transformers' greedy answer to the tokens of a prompt, under its own names of settings."""
    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    none = model.config.text_config.vocab_size  # no token has this id

    @torch.inference_mode()
    def generate(prompt_token_ids, max_tokens, *, processors=(), **settings):
        tokens = torch.tensor([prompt_token_ids])
        answer = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=max_tokens,
            logits_processor=LogitsProcessorList(processors), **{"eos_token_id": none, **settings},
        )  # fmt: skip
        return answer[0, len(prompt_token_ids) :].tolist()

    return generate


PROMPT = "USER: What is the capital of France? ASSISTANT:"
MAX_TOKENS = 12


def greedy(**values):
    return SamplingParams(temperature=0, max_tokens=MAX_TOKENS, **{"ignore_eos": True, **values})


def answer_of(llm, params):
    (output,) = llm.generate(PROMPT, params, use_tqdm=False)
    return output.outputs[0]


@pytest.fixture(scope="module")
def plain(tiny_llm, reference):
    """The greedy answer that the options below must change."""
    tokens = answer_of(tiny_llm, greedy()).token_ids
    assert tokens == reference(tiny_llm.get_tokenizer().encode(PROMPT), MAX_TOKENS)
    return tokens


def test_options_change_the_tokens_as_in_transformers(tiny_llm, reference, plain):
    tokenizer = tiny_llm.get_tokenizer()
    prompt = tokenizer.encode(PROMPT)
    first, third = plain[0], plain[2]
    cases = [
        (greedy(repetition_penalty=0.25), {"repetition_penalty": 0.25}),
        (greedy(logit_bias={first: -100.0, 9: 1.5}), {"sequence_bias": {(first,): -100.0, (9,): 1.5}}),
        (greedy(logit_bias={9: 100.0}), {"sequence_bias": {(9,): 100.0}}),
        (greedy(stop_token_ids=[third]), {"eos_token_id": third}),
        (greedy(stop_token_ids=[first], min_tokens=5), {"eos_token_id": first, "min_new_tokens": 5}),
    ]
    for params, settings in cases:
        assert answer_of(tiny_llm, params).token_ids == reference(prompt, MAX_TOKENS, **settings), settings
    changed = [reference(prompt, MAX_TOKENS, **settings) for _, settings in cases]
    assert all(tokens != plain for tokens in changed), "an option that changes nothing shows nothing"


def test_bad_words_are_not_generated_as_in_transformers(tiny_llm, reference, plain):
    """Words of several tokens that the answer would hold, found in it by their text."""
    tokenizer = tiny_llm.get_tokenizer()
    prompt = tokenizer.encode(PROMPT)
    words = [
        text.strip()
        for start in range(len(plain) - 1)
        for text in [tokenizer.decode(plain[start : start + 2])]
        if tokenizer.encode(text, add_special_tokens=False) == plain[start : start + 2] and text.strip()
    ]
    assert words
    variants = [tokenizer.encode(form, add_special_tokens=False) for word in words for form in (word, " " + word)]
    answer = answer_of(tiny_llm, greedy(bad_words=words))
    assert answer.token_ids == reference(prompt, MAX_TOKENS, bad_words_ids=variants)
    assert answer.token_ids != plain
    assert all(word in tokenizer.decode(plain) for word in words)
    for variant in variants:
        assert not any(answer.token_ids[i : i + len(variant)] == variant for i in range(MAX_TOKENS))


def test_logits_processors_run_as_in_transformers(tiny_llm, reference, plain):
    seen = []

    def no_odd_tokens(tokens, logits):
        seen.append(list(tokens))
        logits[1::2] = -torch.inf
        return logits

    class NoOddTokens(LogitsProcessor):
        def __call__(self, input_ids, scores):
            scores = scores.clone()
            scores[:, 1::2] = -torch.inf
            return scores

    answer = answer_of(tiny_llm, greedy(logits_processors=[no_odd_tokens]))
    prompt = tiny_llm.get_tokenizer().encode(PROMPT)
    assert answer.token_ids == reference(prompt, MAX_TOKENS, processors=[NoOddTokens()])
    assert answer.token_ids != plain
    assert seen == [answer.token_ids[:count] for count in range(MAX_TOKENS)]
    assert answer_of(tiny_llm, greedy()).token_ids == plain


def test_a_stop_string_is_found_across_tokens_of_the_models_own(tiny_llm, reference, plain):
    tokenizer = tiny_llm.get_tokenizer()
    prompt = tokenizer.encode(PROMPT)
    whole = tokenizer.decode(prompt + plain)[len(tokenizer.decode(prompt)) :]
    texts = [tokenizer.decode(prompt + plain[:count])[len(tokenizer.decode(prompt)) :] for count in range(MAX_TOKENS)]
    edge = next(len(text) for text in texts[3:] if text and not text.endswith("\ufffd"))
    stop = whole[edge - 1 : edge + 1]
    end = whole.index(stop)
    for include in (False, True):
        answer = answer_of(tiny_llm, greedy(stop=[stop], include_stop_str_in_output=include))
        assert answer.text == whole[: end + (len(stop) if include else 0)]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", stop)
        count = len(answer.token_ids)
        assert answer.token_ids == plain[:count]
        assert stop in tokenizer.decode(plain[:count])
        assert stop not in tokenizer.decode(plain[: count - 1])


def test_answers_of_one_request_differ_and_the_best_are_those_of_a_run_that_shows_all(tiny_llm):
    shown = SamplingParams(n=6, seed=3, temperature=1, max_tokens=6, ignore_eos=True, logprobs=2)
    (output,) = tiny_llm.generate(PROMPT, shown, use_tqdm=False)
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 6
    for answer in output.outputs:
        told = [entry[token] for token, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
        assert answer.cumulative_logprob == pytest.approx(sum(one.logprob for one in told))
        texts = [tiny_llm.get_tokenizer().decode([token]) for token in answer.token_ids]
        assert [one.decoded_token for one in told] == texts
        assert all(
            2 <= len(entry) <= 3 and sorted(one.rank for one in entry.values())[:2] == [1, 2]
            for entry in answer.logprobs
        )
    best = SamplingParams(n=2, best_of=6, seed=3, temperature=1, max_tokens=6, ignore_eos=True)
    *growing, last = [[answer.token_ids for answer in output.outputs] for output in tiny_llm.stream(PROMPT, best)]
    assert all(tokens == [[], []] for tokens in growing)
    ranked = sorted(output.outputs, key=lambda answer: -answer.cumulative_logprob)
    assert last == [answer.token_ids for answer in ranked[:2]]


def test_prompt_log_probabilities_name_every_token_of_a_picture_prompt(tiny_llm):
    params = greedy(prompt_logprobs=1)
    (output,) = tiny_llm.generate(with_image(), params, use_tqdm=False)
    assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
    assert output.prompt_logprobs[0] is None
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    assert all(token in entry and 1 <= len(entry) <= 2 for token, entry in pairs)
    with pytest.raises(ValueError, match="prompt_logprobs = 6: must be at most max_logprobs = 5"):
        tiny_llm.generate(with_image(), greedy(prompt_logprobs=6), use_tqdm=False)


def test_a_cached_beginning_is_counted_unless_the_salt_differs(tiny_llm):
    prompt = "A beginning that nobody has had before, long enough for two blocks of sixteen tokens: " + "x y " * 10

    def cached(**more):
        (output,) = tiny_llm.generate({"prompt": prompt, **more}, greedy(), use_tqdm=False)
        return output.num_cached_tokens, tuple(output.outputs[0].token_ids)

    (first, tokens), (second, again), (salted, same) = cached(), cached(), cached(cache_salt="another tenant")
    assert (first, salted) == (0, 0)
    assert second >= 32
    assert tokens == again == same
    assert cached(cache_salt="another tenant")[0] == second


def test_an_llm_may_be_made_and_used_in_another_thread(fake_llm):
    answers = []
    thread = threading.Thread(
        target=lambda: answers.extend(tokens_of(fake_llm().generate("a", GREEDY, use_tqdm=False)))
    )
    thread.start()
    thread.join()
    assert len(answers) == 1
