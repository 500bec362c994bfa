from __future__ import annotations

from pathlib import Path

import pytest

from dist_vlm import EngineConfig
from dist_vlm.config import resolve
from dist_vlm.executor.base import ExecutorInfo
from dist_vlm.launch.bench_floor import Floor
from dist_vlm.launch.bench_rates import DeviceRates
from dist_vlm.workers.config import LoadReport
from dist_vlm.workers.models import read_spec

# Of one H200.
RATES = DeviceRates(4.27e12, 668e12, "bfloat16")
# Read off the checkpoint's shapes by hand: 4 products of attention, 3 of the MLP, 32 layers, and the head.
LAYERS = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
HEAD = 4096 * 32064
VISION = 300_000_000
KV = 512 * 1024


def floor_of(model: Path, **fields: object) -> Floor:
    config = resolve(EngineConfig.from_fields(model=str(model), executor="ray", device="cpu", **fields))
    report = LoadReport(0, 1, VISION, 1, 1, 1, 1, {}, 1)
    return Floor.of(config, read_spec(str(model)), ExecutorInfo(1, (report,)), RATES)


@pytest.fixture
def floor(facts_7b: Path) -> Floor:
    return floor_of(facts_7b, dtype="bfloat16")


def test_the_shapes_give_the_published_bytes(floor: Floor) -> None:
    assert floor.language_bytes == 2 * (LAYERS + HEAD)
    assert round(floor.language_bytes / 1e9, 2) == 13.21
    assert floor.kv_token_bytes == KV
    assert (floor.vision_parameters, floor.image_rows) == (VISION, 576)


def test_a_small_step_is_a_read_of_the_weights_and_a_large_one_is_arithmetic(floor: Floor) -> None:
    assert floor.decode_step_s(1, 0) == pytest.approx(13.2147e9 / 4.27e12, rel=1e-4)
    assert floor.decode_step_s(1, 1000) - floor.decode_step_s(1, 0) == pytest.approx(1000 * KV / 4.27e12)
    assert floor.decode_step_s(256, 128) == pytest.approx(2 * (LAYERS + HEAD) * 256 / 668e12 + 256 * 128 * KV / 4.27e12)


def test_the_first_token_costs_prefill_and_the_picture(floor: Floor) -> None:
    picture = 2 * VISION * 576 / 668e12
    assert floor.prefill_s(643) == pytest.approx((2 * LAYERS * 643 + 2 * HEAD) / 668e12 + picture)
    assert floor.prefill_s(1, num_images=0) == pytest.approx(2 * (LAYERS + HEAD) / 4.27e12)


def test_many_requests_cost_their_prefill_and_each_step_of_full_batches(floor: Floor) -> None:
    one_by_one = sum(floor.decode_step_s(256, 643 + step) / 256 for step in range(1, 128))
    prefill = (2 * LAYERS * 643 + 2 * HEAD + 2 * VISION * 576) / 668e12
    expected = 512 * (prefill + one_by_one)
    assert floor.throughput_s(512, 643, num_outputs=128, batch=256) == pytest.approx(expected)
    # The estimate by measured products was 37 requests a second; without their losses it is somewhat more.
    assert 37 < 512 / expected < 40
    assert floor.throughput_s(512, 643, num_outputs=1, batch=256) == pytest.approx(512 * prefill)


def test_ranks_share_the_language_model_and_the_pictures(floor: Floor, facts_7b: Path) -> None:
    halves = floor_of(facts_7b, dtype="bfloat16", tensor_parallel_size=2)
    assert halves.language_bytes == floor.language_bytes / 2
    assert halves.kv_token_bytes == floor.kv_token_bytes / 2
    assert halves.prefill_s(643) == pytest.approx(floor.prefill_s(643) / 2)
    alike = floor_of(facts_7b, dtype="bfloat16", tensor_parallel_size=2, vision_data_parallel=False)
    assert alike.prefill_s(643) - halves.prefill_s(643) == pytest.approx(VISION * 576 / 668e12)


def test_keys_and_values_of_the_heads_that_there_are(tiny_facts: Path) -> None:
    # 2 layers, 4 heads, 2 of keys and values, hidden size 128, in float32.
    one = floor_of(tiny_facts)
    assert one.kv_token_bytes == 2 * 2 * 2 * 32 * 4
    inner = read_spec(str(tiny_facts)).intermediate_size
    assert one.layer_parameters == 2 * (128 * 128 * 2 + 128 * 64 * 2 + 3 * 128 * inner)
