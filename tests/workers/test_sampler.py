from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dist_vlm.kernels.choice import choose
from dist_vlm.kernels.penalties import penalise
from dist_vlm.kernels.philox import uniform_noise
from dist_vlm.kernels.sample import draw
from dist_vlm.workers.plan import SamplingRow, TokenLogprobs
from dist_vlm.workers.sampler import SampleRow, sample_tokens, sampling_bytes, token_logprobs

VOCAB, NUM_SLOTS, MAX_LEN = 67, 16, 24
# Without a GPU its kernels are interpreted, see tests/conftest.py.
TRITON_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def favour_even(generated: list[int], logits: Tensor) -> Tensor:
    return logits + (torch.arange(logits.shape[0], device=logits.device) % 2 == 0) * (1.0 + len(generated))


PROCESSORS = {"even": (favour_even,)}
OPTIONS = [
    SamplingRow(),
    SamplingRow(temperature=1.0),
    SamplingRow(temperature=1.6, top_k=3),
    SamplingRow(temperature=1.2, top_p=0.85),
    SamplingRow(temperature=1.1, min_p=0.1),
    SamplingRow(temperature=1.5, top_k=20, top_p=0.9, min_p=0.05),
    SamplingRow(repetition_penalty=1.7),
    SamplingRow(presence_penalty=1.5, frequency_penalty=0.5),
    SamplingRow(temperature=0.9, repetition_penalty=0.6, presence_penalty=-0.5, top_p=0.7),
    SamplingRow(logit_bias=((3, 4.0), (5, -2.0))),
    SamplingRow(temperature=1.0, logit_bias=((3, 100.0),), bad_words=((3,), (4, 5))),
    SamplingRow(bad_words=((1, 2), (3,), (4, 5, 6))),
    SamplingRow(min_tokens=50, stop_token_ids=(0, 1, 2, 3)),
    SamplingRow(temperature=1.0, min_tokens=50, stop_token_ids=(9,), top_k=5),
    SamplingRow(processors="even"),
    SamplingRow(
        temperature=0.7,
        top_k=30,
        top_p=0.95,
        min_p=0.02,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        repetition_penalty=1.2,
        logit_bias=((7, 1.0),),
        bad_words=((8,), (9, 10)),
        min_tokens=50,
        stop_token_ids=(11,),
        processors="even",
    ),
]  # fmt: skip


def batch(seed: int) -> tuple[Tensor, Tensor, list[SampleRow]]:
    """Logits and tokens of 16 rows with all options, each row in a slot of another number. Few tokens are likely, and
    they are the known ones, so that penalties and bans meet them."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(OPTIONS), VOCAB, generator=generator) * 2
    logits[:, :12] += 3
    token_ids = torch.randint(0, 12, (NUM_SLOTS, MAX_LEN), generator=generator)
    rows = []
    for index, option in enumerate(OPTIONS):
        num_prompt = int(torch.randint(1, 12, (1,), generator=generator))
        position = num_prompt + int(torch.randint(0, 12, (1,), generator=generator))
        sampling = replace(option, seed=1000 * seed + index, sample_index=index % 3)
        rows.append(SampleRow(sampling, (index * 5 + 3) % NUM_SLOTS, position, num_prompt))
    return logits, token_ids, rows


def reference_token(logits: Tensor, row: SampleRow, token_ids: Tensor) -> int:
    """transformers' processors one after another, then the Gumbel-max rule, for one row of logits [1, vocab]."""
    sampling, known = row.sampling, token_ids[row.slot : row.slot + 1, : row.position]
    generated = known[0, row.num_prompt_tokens :].tolist()
    for function in PROCESSORS.get(sampling.processors, ()):
        logits = function(generated, logits[0])[None]
    logits = logits.clone()
    for token, bias in sampling.logit_bias:
        logits[0, token] += bias
    if sampling.min_tokens:
        logits = MinNewTokensLengthLogitsProcessor(
            row.num_prompt_tokens, sampling.min_tokens, list(sampling.stop_token_ids)
        )(known, logits)
    if sampling.bad_words:
        logits = NoBadWordsLogitsProcessor([list(word) for word in sampling.bad_words])(known, logits)
    logits = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(known, logits)
    for token, count in Counter(generated).items():
        logits[0, token] -= sampling.presence_penalty + sampling.frequency_penalty * count
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = TemperatureLogitsWarper(float(sampling.temperature))(known, logits)
    if sampling.top_k:
        logits = TopKLogitsWarper(sampling.top_k)(known, logits)
    logits = TopPLogitsWarper(sampling.top_p)(known, logits)
    logits = MinPLogitsWarper(sampling.min_p)(known, logits)
    key = (torch.tensor([value]) for value in (sampling.seed, sampling.sample_index, row.position))
    return int((logits - torch.log(-torch.log(uniform_noise(*key, VOCAB)))).argmax())


@pytest.mark.parametrize("seed", range(8))
def test_tokens_are_those_of_transformers_processors(seed: int) -> None:
    logits, token_ids, rows = batch(seed)
    tokens = sample_tokens(logits, rows, token_ids=token_ids, processors=PROCESSORS, draw=draw, penalise=penalise)
    expected = [reference_token(logits[i : i + 1], row, token_ids) for i, row in enumerate(rows)]
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == expected


@pytest.mark.parametrize("seed", [0, 1])
def test_tokens_penalised_and_drawn_in_triton_are_those_of_transformers_processors(seed: int) -> None:
    logits, token_ids, rows = batch(seed)
    ops = choose("triton", TRITON_DEVICE)
    tokens = sample_tokens(
        logits.to(TRITON_DEVICE),
        rows,
        token_ids=token_ids.to(TRITON_DEVICE),
        processors=PROCESSORS,
        draw=ops.draw,
        penalise=ops.penalise,
    )
    assert tokens.tolist() == [reference_token(logits[i : i + 1], row, token_ids) for i, row in enumerate(rows)]


def test_the_options_of_the_batch_change_tokens() -> None:
    """The comparison above would see an option that did nothing."""
    changed: Counter[int] = Counter()
    for seed in range(8):
        logits, token_ids, rows = batch(seed)
        for index, row in enumerate(rows):
            plain = replace(
                SamplingRow(temperature=row.sampling.temperature, seed=row.sampling.seed),
                sample_index=row.sampling.sample_index,
            )
            found = reference_token(logits[index : index + 1], row, token_ids)
            changed[index] += found != reference_token(
                logits[index : index + 1], replace(row, sampling=plain), token_ids
            )
    asking = [index for index, option in enumerate(OPTIONS) if replace(option, temperature=0.0) != SamplingRow()]
    assert [index for index in asking if not changed[index]] == []


@pytest.mark.parametrize("seed", [0, 1])
def test_a_row_gets_the_same_token_alone_and_among_fifteen_others(seed: int) -> None:
    logits, token_ids, rows = batch(seed)
    before = logits.clone()
    together = sample_tokens(
        logits, rows, token_ids=token_ids, processors=PROCESSORS, draw=draw, penalise=penalise
    ).tolist()
    assert torch.equal(logits, before)
    for index, row in enumerate(rows):
        alone = sample_tokens(
            logits[index : index + 1], [row], token_ids=token_ids, processors=PROCESSORS, draw=draw, penalise=penalise
        )
        assert alone.tolist() == together[index : index + 1]
    order = [5, 2, 7, 0, 15]
    fewer = sample_tokens(
        logits[order],
        [rows[i] for i in order],
        token_ids=token_ids,
        processors=PROCESSORS,
        draw=draw,
        penalise=penalise,
    ).tolist()
    assert fewer == [together[i] for i in order]


def test_a_row_of_numbers_that_are_not_finite_changes_no_other() -> None:
    logits, token_ids, rows = batch(3)
    expected = sample_tokens(
        logits, rows, token_ids=token_ids, processors=PROCESSORS, draw=draw, penalise=penalise
    ).tolist()
    broken = [0, 3, 5, 8]
    logits[broken] = torch.nan
    found = sample_tokens(
        logits, rows, token_ids=token_ids, processors=PROCESSORS, draw=draw, penalise=penalise
    ).tolist()
    assert all(0 <= token < VOCAB for token in found)
    assert [token for i, token in enumerate(found) if i not in broken] == [
        token for i, token in enumerate(expected) if i not in broken
    ]


def test_a_wrong_row_raises_alone_and_in_a_batch() -> None:
    logits, token_ids, rows = batch(0)
    rows[4] = replace(rows[4], sampling=SamplingRow(logit_bias=((VOCAB, 1.0),)))
    for part in (slice(0, None), slice(4, 5)):
        with pytest.raises(ValueError, match=f"logit_bias holds token {VOCAB}"):
            sample_tokens(
                logits[part], rows[part], token_ids=token_ids, processors=PROCESSORS, draw=draw, penalise=penalise
            )
    sample_tokens(logits[:4], rows[:4], token_ids=token_ids, processors=PROCESSORS, draw=draw, penalise=penalise)


def test_logprobs_are_the_models_own_and_counted_row_by_row() -> None:
    logits, _, _ = batch(1)
    logits = logits[:3]
    logits[1] = logits[1].round()
    chosen = torch.tensor([4, 8, 66])
    entries = token_logprobs(logits, chosen, [0, 5, 2]).to_host().read()
    exact = logits.to(torch.float64).log_softmax(-1)
    for row, (entry, count) in enumerate(zip(entries, [0, 5, 2], strict=True)):
        values = logits[row].tolist()
        order = sorted(range(VOCAB), key=lambda token, values=values: (-values[token], token))[:count]
        assert isinstance(entry, TokenLogprobs)
        assert entry.logprob == pytest.approx(exact[row, chosen[row]].item(), abs=5e-6)
        assert entry.rank == 1 + sum(value > values[chosen[row]] for value in values)
        assert list(entry.top_ids) == order
        assert list(entry.top_logprobs) == pytest.approx(exact[row, order].tolist(), abs=5e-6)


def test_no_rows_have_no_logprobs() -> None:
    assert token_logprobs(torch.zeros(0, VOCAB), torch.zeros(0, dtype=torch.int64), []).read() == []


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_gpu_is_not_waited_for_and_its_rows_do_not_depend_on_each_other(kernels: str) -> None:
    ops = choose(kernels, "cuda")
    logits, token_ids, rows = batch(2)
    logits, token_ids = logits.cuda(), token_ids.cuda()
    rows = [replace(row, sampling=replace(row.sampling, processors="")) for row in rows]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens = sample_tokens(logits, rows, token_ids=token_ids, processors={}, draw=ops.draw, penalise=ops.penalise)
        pending = token_logprobs(logits, tokens, [3] * len(rows)).to_host()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    together = tokens.tolist()
    assert together == [reference_token(logits[i : i + 1].cpu(), row, token_ids.cpu()) for i, row in enumerate(rows)]
    for index, row in enumerate(rows):
        alone = sample_tokens(
            logits[index : index + 1], [row], token_ids=token_ids, processors={}, draw=ops.draw, penalise=ops.penalise
        )
        assert alone.tolist() == [together[index]]
    exact = logits.cpu().to(torch.float64).log_softmax(-1)
    for index, entry in enumerate(pending.read()):
        assert entry.logprob == pytest.approx(exact[index, together[index]].item(), abs=5e-6)
        assert list(entry.top_ids) == exact[index].topk(3).indices.tolist()


@pytest.mark.gpu
def test_processors_run_on_a_gpu() -> None:
    logits, token_ids, rows = batch(4)
    found = sample_tokens(
        logits.cuda(), rows, token_ids=token_ids.cuda(), processors=PROCESSORS, draw=draw, penalise=penalise
    ).tolist()
    assert found == [reference_token(logits[i : i + 1], row, token_ids) for i, row in enumerate(rows)]


@pytest.mark.gpu
@pytest.mark.parametrize("kernels", ["torch", "triton"])
@pytest.mark.parametrize("count", [1, 16, 200])
def test_sampling_stays_within_its_bytes(count: int, kernels: str) -> None:
    ops = choose(kernels, "cuda")
    vocab, length = 32003, 2048
    logits = torch.randn(count, vocab, device="cuda")
    token_ids = torch.randint(0, vocab, (count, length), device="cuda")
    bound, peaks = sampling_bytes(count, vocab, length), []

    def peak_of(rows: list[SampleRow]) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        tokens = sample_tokens(logits, rows, token_ids=token_ids, processors={}, draw=ops.draw, penalise=ops.penalise)
        token_logprobs(logits, tokens, [20] * count)
        return torch.cuda.max_memory_allocated() - before

    options = [replace(option, processors="") for option in OPTIONS]
    for option in options:
        peaks.append(peak_of([SampleRow(option, i, length, 8) for i in range(count)]))
    peaks.append(peak_of([SampleRow(options[-1 - i % len(options)], i, length, 8) for i in range(count)]))
    assert max(peaks) <= bound
    if kernels == "torch":
        assert max(peaks) >= bound / 3
