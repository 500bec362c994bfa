"""The same tokens on a GPU: one rank, and two ranks that share one GPU through Ray."""

from __future__ import annotations

import pytest

from dist_vlm import LLM, SamplingParams

from .cases import demo_cases
from .reference import expected_tokens
from .test_parity import DEMO, MAX_TOKENS, prompt_of

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


@pytest.mark.parametrize(
    ("num_ranks", "executor", "share"), [(1, "inline", False), (1, "ray", False), (2, "ray", True)]
)
def test_tokens_equal_transformers_on_a_cpu(num_ranks: int, executor: str, share: bool) -> None:
    cases = demo_cases(with_images=True)
    with LLM(
        str(DEMO), dtype="float32", device="cuda", tensor_parallel_size=num_ranks, executor=executor,
        share_gpu=share, kv_cache_memory_gib=0.5, max_num_batched_tokens=64,
    ) as llm:  # fmt: skip
        prompts = [prompt_of(case, "pixels", DEMO) for case in cases]
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=MAX_TOKENS), use_tqdm=False)
        assert llm.stats.num_image_cuts > 0
    assert [output.outputs[0].token_ids for output in outputs] == expected_tokens(DEMO, cases, MAX_TOKENS)


def test_the_kv_cache_takes_what_the_gpu_has_left_and_no_more() -> None:
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    with LLM(str(DEMO), dtype="float32", device="cuda", executor="inline", gpu_memory_utilization=0.5) as llm:
        (report,) = llm.executor_info.reports
        claimed = report.num_blocks * report.kv_block_bytes + report.weight_bytes
        assert 0.4 * total < claimed < 0.5 * total
        torch.cuda.reset_peak_memory_stats()
        cases = demo_cases(with_images=True)
        prompts = [prompt_of(case, "pixels", DEMO) for case in cases]
        llm.generate(prompts, SamplingParams(temperature=1.0, max_tokens=8), use_tqdm=False)
        assert torch.cuda.max_memory_allocated() < 0.5 * total
