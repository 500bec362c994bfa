"""Every hidden state against transformers' CLIPVisionModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dist_vlm.kernels.choice import choose
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.models.llava.vision import ClipVisionModel
from dist_vlm.workers.safetensors_source import SafetensorsSource

from .rig import CPU, OPS, llava_config, random_model

TOWERS = {
    "default": {},
    "eps": {"layer_norm_eps": 0.3},
    "heads": {"num_attention_heads": 8},
    "gelu": {"hidden_act": "gelu"},
    "gelu_new": {"hidden_act": "gelu_new"},
    "relu2": {"hidden_act": "relu2"},
    "edges that no patch covers": {"patch_size": 9},
    "one channel": {"num_channels": 1},
}


def load(path: Path, *, dtype: torch.dtype = torch.float32, kernels: str = "torch") -> ClipVisionModel:
    spec = read_spec(str(path))
    family = get_family(spec.family)
    vision = family.build_vision(spec, ops=choose(kernels, CPU), dtype=dtype, device=CPU)
    with SafetensorsSource(path) as source:
        family.load_vision(vision, spec, source)
    assert isinstance(vision, ClipVisionModel)
    return vision


def save(path: Path, tower: dict[str, Any]) -> Any:
    """transformers' model with the last layer's output selected, so that every layer is needed."""
    model = random_model(llava_config(vision=tower, llava={"vision_feature_layer": -1}))
    model.save_pretrained(path)
    return model


def pixels(count: int, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, 28, 28, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("tower", TOWERS.values(), ids=TOWERS.keys())
@torch.inference_mode()
def test_every_hidden_state_is_that_of_transformers(tmp_path, tower) -> None:
    model = save(tmp_path, tower)
    batch = pixels(3, tower.get("num_channels", 3))
    expected = model.model.vision_tower(batch, output_hidden_states=True).hidden_states
    states = [state.clone() for state in load(tmp_path).vision.clip.hidden_states(batch)]
    assert len(states) == len(expected) == 4
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["eps", "heads", "gelu", "gelu_new", "relu2"])
@torch.inference_mode()
def test_every_field_changes_the_last_state(tmp_path, name) -> None:
    """Guards the comparison above: were a field ignored on both sides, they would still agree."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "changed").mkdir()
    save(tmp_path / "plain", {})
    save(tmp_path / "changed", TOWERS[name])
    plain, changed = (load(tmp_path / place).encode_pixels(pixels(2)) for place in ("plain", "changed"))
    assert (plain - changed).abs().max() > 1e-2


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
@torch.inference_mode()
def test_in_bfloat16_it_is_as_near_to_float32_as_transformers_is(tmp_path, kernels) -> None:
    model = save(tmp_path, {})
    batch = pixels(8).bfloat16()
    exact = torch.stack(list(model.get_image_features(batch.float()).pooler_output))
    ours = load(tmp_path, dtype=torch.bfloat16, kernels=kernels).encode_pixels(batch)
    theirs = torch.stack(list(model.bfloat16().get_image_features(batch).pooler_output))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    # Weights are rounded on both sides, which is most of the error.
    own, other = ((features.float() - exact).square().mean().sqrt() for features in (ours, theirs))
    assert 0 < own < 1.1 * other
    assert other < 0.1 * exact.std()


@torch.inference_mode()
def test_a_state_lasts_until_the_next_is_asked_for(tmp_path) -> None:
    save(tmp_path, {})
    states = list(load(tmp_path).vision.clip.hidden_states(pixels(2)))
    assert len({state.data_ptr() for state in states}) == 1


@pytest.mark.parametrize("shape", [(2, 3, 14, 56), (2, 1, 28, 28), (3, 28, 28)])
@torch.inference_mode()
def test_pixels_of_another_shape_are_refused(tmp_path, shape) -> None:
    save(tmp_path, {})
    with pytest.raises(ValueError, match=r"pixel_values has shape \[.*\], must be \[any, 3, 28, 28\]"):
        load(tmp_path).encode_pixels(torch.zeros(shape))


@torch.inference_mode()
def test_without_memory_it_has_its_shapes(tiny_facts) -> None:
    spec, device = read_spec(str(tiny_facts)), torch.device("meta")
    vision = get_family(spec.family).build_vision(spec, ops=OPS, dtype=torch.float16, device=device)
    features = vision.encode_pixels(torch.empty((5, *spec.image_input_shape[1:]), dtype=torch.float16, device=device))
    assert (features.shape, features.dtype) == ((5, spec.image_feature_size, spec.hidden_size), torch.float16)
