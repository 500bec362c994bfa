from __future__ import annotations

import pytest
from bench_fakes import SlowLLM, Words

from dist_vlm.launch.bench_floor import Floor
from dist_vlm.launch.bench_rates import DeviceRates
from dist_vlm.launch.bench_steps import Prompts, Settings, report, step_times
from dist_vlm.launch.bench_workload import words

CHOSEN = Settings(batches=(1, 4), prompt_tokens=6, tokens=(10, 30), rounds=2)


def test_prefill_and_all_that_is_once_drop_out() -> None:
    # 3 s that do not depend on the answers' length, and 5 ms a step and 1 ms more for each sequence.
    llm = SlowLLM(lambda prompts, tokens: 3 + tokens * (0.005 + 0.001 * prompts))
    prompts = Prompts(Words(), num_tokens=6)
    assert step_times(llm.engine(), prompts, 4, CHOSEN) == [pytest.approx(0.009), pytest.approx(0.009)]
    assert [(len(given), params.max_tokens) for given, params in llm.calls] == [(4, 10), (4, 30)] * 2
    given = [one["prompt_token_ids"] for call, _ in llm.calls for one in call]
    assert given == [[len(word) for word in words(index).split()[:6]] for index in range(16)]


def test_a_batch_that_is_never_whole_is_no_measurement() -> None:
    # The answers of 10 tokens end 9 ms after they began, and the fourth begins 12 ms after the first.
    llm = SlowLLM(lambda *_: 1.0, apart=0.004)
    prompts = Prompts(Words(), num_tokens=6)
    with pytest.raises(RuntimeError, match="--tokens 10,30: the first of 4 requests had ended when the last one began"):
        step_times(llm.engine(), prompts, 4, CHOSEN)


def test_each_batch_stands_beside_its_floor() -> None:
    floor = Floor(
        rates=DeviceRates(1e6, 1e6, "bfloat16"),
        item_bytes=2,
        layer_parameters=8.0,
        head_parameters=2.0,
        kv_token_bytes=10.0,
        vision_parameters=100,
        image_rows=5,
        image_share=1.0,
    )
    found = report({1: [0.5, 0.2, 0.3], 4: [0.6]}, floor, CHOSEN)
    assert [(one.name, one.value) for one in found.figures] == [
        ("step_1", pytest.approx(300)),
        ("step_4", pytest.approx(600)),
    ]
    # Tokens 11 to 30 are computed at 6 + 10 to 6 + 29 positions.
    context = sum(6 + known for known in range(10, 30)) / 20
    assert found.details["mean_context_tokens"] == context
    least = [1e3 * (max(20, 20 * batch) + batch * 10 * context) / 1e6 for batch in (1, 4)]
    assert [one.floor for one in found.figures] == [pytest.approx(one) for one in least]
    assert found.details["by_batch"]["1"] == {"count": 3, "median_ms": 300, "min_ms": 200, "max_ms": 500}
