from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import make_llava
import pytest

from dist_vlm.config_load import load_config
from dist_vlm.workers.models import read_spec

CONFIGS = Path(__file__).parents[3] / "configs"


def parameters(preset: Mapping[str, Any], beginning: str) -> int:
    shapes = (shape for name, shape, *_ in make_llava.tensor_specs(preset) if name.startswith(beginning))
    return sum(map(math.prod, shapes))


@pytest.mark.parametrize(
    ("preset", "language"),
    # Llama 2's own counts, with the 64 rows that LLaVA adds to the vocabulary at both ends.
    [("7b", 6_738_415_616 + 2 * 64 * 4096), ("70b", 68_976_648_192 + 2 * 64 * 8192)],
)
def test_the_language_model_has_the_size_it_is_named_after(preset: str, language: int) -> None:
    assert parameters(make_llava.PRESETS[preset], "language_model.") == language


def test_the_towers_of_both_sizes_are_one() -> None:
    small, large = make_llava.PRESETS["7b"], make_llava.PRESETS["70b"]
    assert parameters(small, "vision_tower.") == parameters(large, "vision_tower.")


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_a_launch_of_the_70b_class_is_resolved_from_its_files(tmp_path: Path, num_ranks: int) -> None:
    make_llava.write_config(tmp_path, make_llava.PRESETS["70b"], "bfloat16")
    spec = read_spec(str(tmp_path))
    assert (spec.num_layers, spec.hidden_size, spec.num_heads, spec.num_kv_heads) == (80, 8192, 64, 8)
    flags = {"model": str(tmp_path), "load_format": "dummy"}
    config = load_config(str(CONFIGS / f"llava-70b-{num_ranks}gpu.yaml"), flags).resolve()
    assert (config.parallel.tensor_parallel_size, config.parallel.device) == (num_ranks, "cuda")
    assert spec.num_kv_heads % num_ranks == spec.intermediate_size % num_ranks == 0
