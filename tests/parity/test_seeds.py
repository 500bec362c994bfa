"""A request with a seed gets the same tokens in float32 whatever it meets: neighbours, chunks, preemption, warm caches,
another number of ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.front import load_front
from dist_vlm.engine.make_core import make_core
from dist_vlm.sampling import SamplingParams

from .cases import noise_cases
from .ranks import Ranks
from .test_parity import prompt_of

MAX_TOKENS = 16
PARAMS = SamplingParams(
    temperature=0.9, top_p=0.95, top_k=200, min_p=0.001, seed=1234, max_tokens=MAX_TOKENS, ignore_eos=True,
    presence_penalty=0.3, frequency_penalty=0.2, repetition_penalty=1.1,
)  # fmt: skip


def tokens_of(llm: Any, prompts: list[Any], params: Any) -> list[list[int]]:
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [answer.token_ids for output in outputs for answer in output.outputs]


def others(count: int) -> list[SamplingParams]:
    """Neighbours that ask for everything a neighbour might."""
    kinds = [
        SamplingParams(temperature=0, max_tokens=MAX_TOKENS),
        SamplingParams(temperature=1.3, seed=5, max_tokens=9, logit_bias={7: 50.0}, logprobs=3),
        SamplingParams(temperature=0.5, top_k=3, max_tokens=12, min_tokens=11, presence_penalty=2.0),
        SamplingParams(temperature=1.0, n=2, seed=8, max_tokens=6, prompt_logprobs=1),
    ]
    return [kinds[index % len(kinds)] for index in range(count)]


@pytest.fixture
def prompts(tiny_checkpoint: Path) -> list[Any]:
    return [prompt_of(case, "pixels", tiny_checkpoint) for case in noise_cases(with_images=True)[:16]]


@pytest.fixture
def alone(ranks: Ranks, tiny_checkpoint: Path, prompts: list[Any]) -> list[int]:
    llm, _ = ranks.engine(
        tiny_checkpoint, num_ranks=1, executor="inline", enable_prefix_caching=False, feature_cache_tokens=0,
        max_steps_in_flight=1,
    )  # fmt: skip
    return tokens_of(llm, [prompts[0]], PARAMS)[0]


def test_with_neighbours_chunked_preempted_and_with_warm_caches(
    ranks: Ranks, tiny_checkpoint: Path, prompts: list[Any], alone: list[int]
) -> None:
    def engine(**changes: Any) -> Any:
        return ranks.engine(tiny_checkpoint, num_ranks=1, executor="inline", **changes)[0]

    llm = engine()
    params = [PARAMS, *others(15)]
    assert tokens_of(llm, prompts, params)[0] == alone, "among 15 others"
    assert tokens_of(llm, [prompts[0]], PARAMS) == [alone], "with a warm cache"
    assert llm.stats.num_hit_tokens > 0
    longest = 2 * len(llm.generate(prompts[0], PARAMS, use_tqdm=False)[0].prompt_token_ids)
    assert tokens_of(engine(budget=5), prompts[:3], [PARAMS, *others(2)])[0] == alone, "in chunks of 5 tokens"

    scarce = engine(max_model_len=longest, num_blocks=3 * -(-longest // 16) // 2)
    # The request itself must be the one that starts over, so it comes last.
    tokens = tokens_of(scarce, [*prompts[1:4], prompts[0]], PARAMS)
    assert scarce.stats.num_preemptions > 0
    assert tokens[-1] == alone, "preempted"


def test_begun_by_another_engine(tiny_checkpoint: Path, prompts: list[Any], alone: list[int]) -> None:
    """What a replica does with a request whose first replica was lost."""
    config = resolve(
        EngineConfig.from_fields(
            model=str(tiny_checkpoint), executor="inline", kernels="torch", dtype="float32", device="cpu",
            max_model_len=512, max_num_seqs=4, kv_cache_memory_gib=0.125,
        )
    )  # fmt: skip
    request = load_front(config).processor.process("a", prompts[0], PARAMS).requests[0]
    core = make_core(config)
    core.start()
    try:
        for num_told in (0, 1, 7, MAX_TOKENS - 1):
            tokens = alone[:num_told]
            core.add(dataclasses.replace(request, output_token_ids=tuple(tokens)))
            while core.has_work:
                tokens = [*tokens, *(token for output in core.step() for token in output.new_token_ids)]
            assert tokens == alone, num_told
    finally:
        core.shutdown()


@pytest.mark.parametrize("transport", ["ray", "direct"])
def test_at_two_ranks(
    transport: str, ranks: Ranks, tiny_checkpoint: Path, prompts: list[Any], alone: list[int]
) -> None:
    llm, _ = ranks.engine(tiny_checkpoint, num_ranks=2, transport=transport, budget=32)
    assert tokens_of(llm, prompts[:6], [PARAMS, *others(5)])[0] == alone


def test_four_samples_of_one_request_differ_and_each_is_repeatable(
    ranks: Ranks, tiny_checkpoint: Path, prompts: list[Any], alone: list[int]
) -> None:
    llm, _ = ranks.engine(tiny_checkpoint, num_ranks=1, executor="inline")
    four = PARAMS.clone()
    four.n, four.best_of = 4, 4
    first, second = (tokens_of(llm, [prompts[0]], four) for _ in range(2))
    assert first == second
    assert len({tuple(tokens) for tokens in first}) == 4
    assert first[0] == alone
    assert llm.stats.num_encoded_images == 1
