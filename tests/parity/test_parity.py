"""Greedy tokens equal transformers' in float32, whatever the ranks, the token budget, the cache and the image's form.

A pairwise part of the matrix runs here, on 4 to 12 prompts a point; `make parity` runs all of it, on 64.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_vlm.multimodal.image import ImageFeatureData
from dist_vlm.sampling import SamplingParams

from .cases import NUM_CASES, ROOT, demo_cases, noise_cases
from .matrix import AXES, Point, full, pairwise
from .ranks import Ranks
from .reference import Case, expected_tokens, reference_for

DEMO = ROOT / "examples" / "demo" / "checkpoint"
MAX_TOKENS = 16
# Where blocks are to run out every answer goes on to this length, past its end of sequence.
SCARCE_TOKENS = 20


@pytest.fixture
def checkpoint_of(tiny_checkpoint: Path) -> dict[str, Path]:
    return {"demo": DEMO, "tiny": tiny_checkpoint}


@pytest.fixture
def num_cases(request: pytest.FixtureRequest, point: Point) -> int:
    """Fewer in the small part, most of all where steps are many, and ranks more than cores."""
    if request.config.getoption("--full-matrix"):
        return NUM_CASES
    if point.budget == 7:
        return 4
    return 8 if point.ranks == 4 else 12


def cases_of(point: Point, num_cases: int) -> tuple[Case, ...]:
    make = demo_cases if point.checkpoint == "demo" else noise_cases
    return make(with_images=point.form != "text")[:num_cases]


def prompt_of(case: Case, form: str, checkpoint: Path) -> dict[str, Any]:
    if case.image is None:
        return {"prompt": case.prompt}
    if form == "features":
        features = reference_for(checkpoint).tower_features(case)
        return {"prompt": case.prompt, "multi_modal_data": ImageFeatureData(features)}
    return {"prompt": case.prompt, "multi_modal_data": {"image": case.image}}


@pytest.mark.timeout(600)
def test_tokens_equal_transformers(point: Point, num_cases: int, ranks: Ranks, checkpoint_of: dict[str, Path]) -> None:
    checkpoint, cases = checkpoint_of[point.checkpoint], cases_of(point, num_cases)
    scarce = point.cache == "scarce"
    max_tokens = SCARCE_TOKENS if scarce else MAX_TOKENS
    expected = expected_tokens(checkpoint, cases, max_tokens, ignore_eos=scarce)
    sizes: dict[str, Any] = {}
    if scarce:
        # Room for one sequence and a half of the longest kind.
        longest = max(len(reference_for(checkpoint).token_ids(case)) for case in cases) + SCARCE_TOKENS
        sizes = {"max_model_len": longest, "num_blocks": 3 * -(-longest // 16) // 2}
    sizes["max_steps_in_flight"] = point.steps
    if point.caches == "off":
        sizes |= {"enable_prefix_caching": False, "feature_cache_tokens": 0}
    llm, loan = ranks.engine(
        checkpoint,
        num_ranks=point.ranks,
        budget=point.budget,
        transport=point.transport,
        halve_step_tokens=point.halve_step_tokens,
        **sizes,
    )
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=scarce)
    prompts = [prompt_of(case, point.form, checkpoint) for case in cases]
    outputs = llm.generate(prompts, params, use_tqdm=False)

    assert [output.error for output in outputs] == [None] * len(cases)
    assert [output.outputs[0].token_ids for output in outputs] == expected
    if point.caches == "kept":
        again = llm.generate(prompts, params, use_tqdm=False)
        assert [output.outputs[0].token_ids for output in again] == expected, "with what the first pass left"
        assert scarce or llm.stats.num_hit_tokens > 0, "where there is room for one prompt, the next takes it"
    else:
        assert llm.stats.num_hit_tokens == 0
    stats = llm.stats
    if point.form != "text" and point.budget == 7:
        assert stats.num_image_cuts > len(cases), "images were cut"
    if point.budget == 7:
        assert max(plan.num_tokens for plan in loan.plans) == 7
    if scarce:
        assert stats.num_preemptions > 0
    if point.form == "text":
        assert stats.num_encoded_images == 0
    else:
        assert stats.num_encoded_images >= len(cases)


def test_the_pairwise_part_holds_every_pair() -> None:
    part = pairwise()
    assert len(full()) == 432
    assert {(point.ranks, point.transport) for point in part} == {(n, t) for n in (1, 2, 4) for t in ("ray", "direct")}
    for first, second in [(a, b) for a in AXES for b in AXES if a < b]:
        seen = {(getattr(point, first), getattr(point, second)) for point in part}
        assert len(seen) == len(AXES[first]) * len(AXES[second])


@pytest.mark.parametrize(("executor", "kernels"), [("inline", "torch"), ("inline", "reference"), ("inline", "cpp")])
def test_one_process_and_reference_ops_give_the_same_tokens(
    executor: str, kernels: str, ranks: Ranks, tiny_checkpoint: Path
) -> None:
    cases = noise_cases(with_images=True)[:16]
    llm, _ = ranks.engine(tiny_checkpoint, num_ranks=1, executor=executor, kernels=kernels)
    prompts = [prompt_of(case, "pixels", tiny_checkpoint) for case in cases]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    expected = expected_tokens(tiny_checkpoint, tuple(cases), MAX_TOKENS)
    assert [output.outputs[0].token_ids for output in outputs] == [tokens[:8] for tokens in expected]


def test_swapping_two_pictures_changes_the_tokens(ranks: Ranks, tiny_checkpoint: Path) -> None:
    first, second = noise_cases(with_images=True)[:2]
    swapped = [Case(first.prompt, second.image), Case(second.prompt, first.image)]
    llm, _ = ranks.engine(tiny_checkpoint, num_ranks=1, executor="inline")
    params = SamplingParams(temperature=0, max_tokens=8)

    def tokens(cases: list[Case]) -> list[list[int]]:
        outputs = llm.generate([prompt_of(case, "pixels", tiny_checkpoint) for case in cases], params, use_tqdm=False)
        return [output.outputs[0].token_ids for output in outputs]

    straight, crossed = tokens([first, second]), tokens(swapped)
    assert straight[0] != crossed[0]
    assert straight[1] != crossed[1]


def test_several_pictures_in_one_prompt(ranks: Ranks, tiny_checkpoint: Path) -> None:
    first, second = noise_cases(with_images=True)[:2]
    prompt = "USER: <image> and <image>\nWhich is brighter? ASSISTANT:"
    reference = reference_for(tiny_checkpoint)
    llm, _ = ranks.engine(tiny_checkpoint, num_ranks=1, executor="inline", budget=9)
    inputs = {"prompt": prompt, "multi_modal_data": {"image": [first.image, second.image]}}
    (output,) = llm.generate(inputs, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert output.outputs[0].token_ids == reference.greedy(prompt, [first.image, second.image], 12)
