from __future__ import annotations

import pytest
from bench_fakes import SlowLLM

from dist_vlm.launch.bench_floor import Floor
from dist_vlm.launch.bench_latency import Round, report, run_rounds
from dist_vlm.launch.bench_rates import DeviceRates
from dist_vlm.launch.bench_workload import SIZES, image, prompt


def test_a_round_is_two_unseen_pictures_of_a_size_and_the_times_of_both_calls() -> None:
    # 50 ms to the first token and 4 ms for each further one.
    llm = SlowLLM(lambda _, tokens: 0.05 + 0.004 * (tokens - 1), prompt_tokens=643)
    rounds = run_rounds(llm.engine(), 4, num_tokens=11, first=0)
    assert [one.size for one in rounds] == ["336x336", "640x480", "1024x768", "336x336"]
    assert [(one.first_s, one.per_token_s) for one in rounds] == [(pytest.approx(0.05), pytest.approx(0.004))] * 4
    assert {one.num_prompt_tokens for one in rounds} == {643}
    asked = [(given[0], params.max_tokens) for given, params in llm.calls]
    assert [tokens for _, tokens in asked] == [1, 11] * 4
    assert [given["prompt"] for given, _ in asked] == [prompt(index) for index in (0, 0, 1, 1, 2, 2, 3, 3)]
    pictures = [given["multi_modal_data"]["image"] for given, _ in asked]
    assert len({one.tobytes() for one in pictures}) == 8
    assert [one.size for one in pictures] == [SIZES[index] for index in (0, 0, 1, 1, 2, 2, 0, 0)]
    assert pictures[0].tobytes() == image(0).tobytes()


def test_medians_stand_beside_their_floors_for_all_and_for_each_size() -> None:
    floor = Floor(
        rates=DeviceRates(1e6, 1e6, "bfloat16"),
        item_bytes=2,
        layer_parameters=10.0,
        head_parameters=0.0,
        kv_token_bytes=1.0,
        vision_parameters=100,
        image_rows=5,
        image_share=1.0,
    )
    rounds = [Round("a", 100, 0.01, 0.002), Round("b", 102, 0.03, 0.004), Round("a", 104, 0.02, 0.003)]
    found = report(rounds, floor, num_tokens=20)
    assert [(one.name, one.value) for one in found.figures] == [
        ("first_token", pytest.approx(20)),
        ("per_token", pytest.approx(3)),
        ("first_token_a", pytest.approx(15)),
        ("per_token_a", pytest.approx(2.5)),
        ("first_token_b", pytest.approx(30)),
        ("per_token_b", pytest.approx(4)),
    ]
    # 2 * 10 * 102 and 2 * 100 * 5 operations; 20 bytes of weights and 102 + 10 of keys and values.
    assert [one.floor for one in found.figures[:2]] == [pytest.approx(2.04 + 1), pytest.approx(0.02 + 0.112)]
    assert found.details["first_token"] == {"count": 3, "median_ms": 20, "min_ms": 10, "max_ms": 30}
    assert found.details["by_size"]["a"]["per_token"] == {"count": 2, "median_ms": 2.5, "min_ms": 2, "max_ms": 3}
    assert found.details["prompt_tokens"] == [100, 102, 104]
