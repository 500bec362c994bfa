"""Features against `get_image_features` of transformers' own model."""

from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.choice import choose
from dist_vlm.workers import layers
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.models.llava.config import read_facts
from dist_vlm.workers.safetensors_source import SafetensorsSource

from ...live_bytes import LiveBytes
from .rig import CPU, OPS, llava_config, random_model

SELECTIONS = {
    "default": {},
    "full": {"vision_feature_select_strategy": "full"},
    "last": {"vision_feature_layer": -1},
    "first layer": {"vision_feature_layer": 1},
    "embeddings": {"vision_feature_layer": -4},
    "several": {"vision_feature_layer": [-2, 1, -1]},
    "several, full": {"vision_feature_layer": [-3, 2], "vision_feature_select_strategy": "full"},
    "several, one twice": {"vision_feature_layer": [2, -2, 0]},
    "gelu_new": {"projector_hidden_act": "gelu_new"},
    "quick_gelu": {"projector_hidden_act": "quick_gelu"},
    "no bias, relu": {"multimodal_projector_bias": False, "projector_hidden_act": "relu"},
}


@pytest.fixture(scope="module", params=SELECTIONS.values(), ids=SELECTIONS.keys())
def loaded(request, tmp_path_factory):
    """(our vision model, transformers' model, spec)."""
    model = random_model(llava_config(llava=request.param))
    path = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(path)
    spec = read_spec(str(path))
    family = get_family(spec.family)
    vision = family.build_vision(spec, ops=OPS, dtype=torch.float32, device=CPU)
    with SafetensorsSource(path) as source:
        family.load_vision(vision, spec, source)
    return vision, model, spec


def pixels(count):
    return torch.randn(count, 3, 28, 28, generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def test_pixels_give_transformers_features(loaded) -> None:
    vision, model, spec = loaded
    expected = torch.stack(list(model.get_image_features(pixels(3)).pooler_output))
    actual = vision.encode_pixels(pixels(3))
    assert actual.shape == (3, spec.image_feature_size, spec.hidden_size)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["reference", "cpp"])
@torch.inference_mode()
def test_other_ops_give_the_same_features(kernels, tmp_path) -> None:
    model = random_model(llava_config())
    model.save_pretrained(tmp_path)
    spec = read_spec(str(tmp_path))
    family = get_family(spec.family)
    vision = family.build_vision(spec, ops=choose(kernels, CPU), dtype=torch.float32, device=CPU)
    with SafetensorsSource(tmp_path) as source:
        family.load_vision(vision, spec, source)
    expected = torch.stack(list(model.get_image_features(pixels(3)).pooler_output))
    torch.testing.assert_close(vision.encode_pixels(pixels(3)), expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_packed_weights_give_the_features_of_plain_ones(tmp_path, monkeypatch) -> None:
    random_model(llava_config()).save_pretrained(tmp_path)
    spec = read_spec(str(tmp_path))
    family, features = get_family(spec.family), []
    for packs in (True, False):
        vision = family.build_vision(spec, ops=OPS, dtype=torch.bfloat16, device=CPU)
        if not packs:
            monkeypatch.setattr(layers, "can_pack", lambda weight: False)
        with SafetensorsSource(tmp_path) as source:
            family.load_vision(vision, spec, source)
        features.append(vision.encode_pixels(pixels(2).bfloat16()).float())
    torch.testing.assert_close(*features, atol=3e-2, rtol=3e-2)


@torch.inference_mode()
def test_features_before_the_projector_are_projected(loaded) -> None:
    vision, model, spec = loaded
    features = torch.randn(2, spec.image_feature_size, spec.image_feature_width)
    torch.testing.assert_close(vision.project_features(features), model.model.multi_modal_projector(features))


def test_only_the_needed_layers_are_built(loaded) -> None:
    vision, model, spec = loaded
    needed = read_facts(spec.path).vision.num_needed_layers
    tower = model.model.vision_tower
    per_layer = sum(parameter.numel() for parameter in tower.encoder.layers[0].parameters())
    embeddings = sum(p.numel() for part in (tower.embeddings, tower.pre_layrnorm) for p in part.parameters())
    projector = sum(parameter.numel() for parameter in model.model.multi_modal_projector.parameters())
    count = sum(parameter.numel() for parameter in vision.module.parameters())
    assert count == embeddings + needed * per_layer + projector
    assert not any(parameter.requires_grad for parameter in vision.module.parameters())


def test_the_tower_runs_in_the_dtype_asked_for(loaded) -> None:
    _, _, spec = loaded
    vision = get_family(spec.family).build_vision(spec, ops=OPS, dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in vision.module.parameters()} == {torch.bfloat16}
    assert not list(vision.module.buffers()), "nothing would fill them"


@pytest.mark.gpu
@torch.inference_mode()
def test_a_gpu_computes_what_the_cpu_does(loaded) -> None:
    vision, _, spec = loaded
    family, device = get_family(spec.family), torch.device("cuda")
    on_gpu = family.build_vision(spec, ops=OPS, dtype=torch.float32, device=device)
    with SafetensorsSource(spec.path) as source:
        family.load_vision(on_gpu, spec, source)
    with torch.backends.cudnn.flags(allow_tf32=False):  # torch lets a float32 convolution use it otherwise
        actual = on_gpu.encode_pixels(pixels(2).cuda()).cpu()
    torch.testing.assert_close(actual, vision.encode_pixels(pixels(2)), atol=1e-3, rtol=1e-3)


# Shapes in which each of the bound's parts is the largest.
SHAPES = {
    "deep": ({"num_hidden_layers": 9}, {}, {}),
    "wide MLP": ({"intermediate_size": 512}, {}, {}),
    "attention": ({"intermediate_size": 8, "num_hidden_layers": 1}, {}, {"vision_feature_layer": -1}),
    "projector": ({}, {"hidden_size": 512}, {}),
    "several layers, full": (
        {},
        {},
        {"vision_feature_layer": [-2, 1, -1, 2], "vision_feature_select_strategy": "full"},
    ),
    "gelu_new": ({"hidden_act": "gelu_new", "intermediate_size": 512}, {}, {}),
}


@pytest.mark.parametrize(("vision", "text", "llava"), SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_image_takes_no_more_memory_than_its_activation_size(tmp_path, vision, text, llava, dtype) -> None:
    config = llava_config(vision={"image_size": 70, "hidden_size": 64} | vision, llava=llava, **text)
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    spec = read_spec(str(tmp_path))
    model = get_family(spec.family).build_vision(spec, ops=OPS, dtype=dtype, device=CPU)
    batch = torch.zeros(16, *spec.image_input_shape[1:], dtype=dtype)
    with torch.no_grad(), LiveBytes(list(model.module.parameters())) as memory:
        features = model.encode_pixels(batch)
    assert memory.now == features.nbytes, "the rest was freed"
    bound = 16 * spec.image_activation_size * dtype.itemsize
    assert 0.6 * bound < memory.peak + batch.nbytes <= bound
