"""One model under every naming of checkpoints; what is missing, unknown or known to be unused."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_vlm.kernels.choice import choose
from dist_vlm.workers.dummy_source import DummySource
from dist_vlm.workers.models import CheckpointError, get_family, read_spec
from dist_vlm.workers.safetensors_source import SafetensorsSource

from ...test_runner import rank_config
from ...thread_comm import thread_comms
from .rig import CPU, OPS, Driver, build_ranks, llava_config, random_model, random_tokens

# What transformers writes -> other files' prefixes for the same tensors.
NAMINGS = {
    "hub": {r"^vision_tower\.": "vision_tower.vision_model."},
    "module tree": {
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.lm_head": "lm_head",
        r"^vision_tower\.": "model.vision_tower.",
        r"^multi_modal_projector": "model.multi_modal_projector",
    },
    "module tree before 5.16": {
        r"^language_model\.model\.": "model.language_model.",
        r"^language_model\.lm_head": "lm_head",
        r"^vision_tower\.": "model.vision_tower.vision_model.",
        r"^multi_modal_projector": "model.multi_modal_projector",
    },
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    random_model(llava_config()).save_pretrained(path)
    return path


def rewritten(saved, target, change):
    """A copy of the checkpoint with `change` applied to its dictionary of tensors."""
    (target / "config.json").write_text((saved / "config.json").read_text())
    save_file(change(load_file(saved / "model.safetensors")), target / "model.safetensors")
    return target


def load_all(path, source=None, *, world_size=1, rank=0):
    spec = read_spec(str(path))
    family = get_family(spec.family)
    with SafetensorsSource(path) if source is None else source as opened:
        language = family.build_language(
            spec, comm=thread_comms(world_size)[rank], ops=choose("torch", CPU), dtype=torch.float32, device=CPU
        )
        family.load_language(language, spec, opened)
        vision = family.build_vision(spec, ops=OPS, dtype=torch.float32, device=CPU)
        family.load_vision(vision, spec, opened)
    return language.module, vision.module, opened


def same(first, second) -> bool:
    pairs = zip(first.named_parameters(), second.named_parameters(), strict=True)
    return all(name == other and torch.equal(value, twin) for (name, value), (other, twin) in pairs)


@pytest.mark.parametrize("naming", NAMINGS.values(), ids=NAMINGS.keys())
def test_every_naming_fills_the_same_model(saved, tmp_path, naming) -> None:
    def rename(tensors):
        renamed = {}
        for name, tensor in tensors.items():
            for pattern, prefix in naming.items():
                name = re.sub(pattern, prefix, name)
            renamed[name] = tensor
        assert set(renamed) != set(tensors)
        return renamed

    expected, actual = load_all(saved), load_all(rewritten(saved, tmp_path, rename))
    assert same(expected[0], actual[0])
    assert same(expected[1], actual[1])


def test_the_tiny_preset_loads_and_agrees_with_transformers(tiny_checkpoint) -> None:
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    driver = Driver(build_ranks(tiny_checkpoint, world_size=2))
    tokens = random_tokens(20, vocab_size=30000)
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(driver.run([(driver.sequence(tokens), 0, 20)]), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_rank_reads_its_slices_and_nothing_else(saved, world_size) -> None:
    for rank in range(world_size):
        language, vision, source = load_all(saved, world_size=world_size, rank=rank)
        held = sum(p.numel() for module in (language, vision) for p in module.parameters()) * 4
        vocabulary = -(-99 // world_size)
        padding = max(0, min(vocabulary, (rank + 1) * vocabulary - 99)) * 48 * 2 * 4  # embedding and head
        assert source.bytes_read == held - padding


@pytest.mark.parametrize("world_size", [2, 4])
def test_dummy_weights_are_one_model_whatever_the_world_size(saved, world_size) -> None:
    one = build_ranks(saved)
    many = build_ranks(saved, world_size=world_size)
    family = get_family(one.spec.family)
    with torch.inference_mode():
        for model in one.models + many.models:
            family.load_language(model, one.spec, DummySource(7))
    tokens = random_tokens(15)
    first, second = (driver.run([(driver.sequence(tokens), 0, 15)]) for driver in (Driver(one), Driver(many)))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-4)
    assert first.std() > 0.1


def test_dummy_weights_of_a_tower_are_those_of_its_checkpoints_tensors(saved) -> None:
    _, vision, _ = load_all(saved, DummySource(7))
    qkv, source = vision.clip.encoder.layers[1].self_attn.qkv, DummySource(7)
    for part, name in zip(qkv.weight.chunk(3), "qkv", strict=True):
        expected = torch.empty(32, 32)
        full_name = f"vision_tower.vision_model.encoder.layers.1.self_attn.{name}_proj.weight"
        source.copy_into(expected, full_name, shape=(32, 32))
        assert torch.equal(part, expected)


def test_a_tied_checkpoint_needs_no_head_and_ignores_one(tmp_path) -> None:
    path = tmp_path / "tied"
    model = random_model(llava_config(tie_word_embeddings=True))
    model.save_pretrained(path)
    names = SafetensorsSource(path).names()
    assert not any("lm_head" in name for name in names)
    expected, _, _ = load_all(path)
    (tmp_path / "headed").mkdir()
    headed = rewritten(path, tmp_path / "headed", lambda t: {**t, "language_model.lm_head.weight": torch.zeros(99, 48)})
    actual, _, _ = load_all(headed)
    assert same(expected, actual)


def without(name):
    return lambda tensors: {key: value for key, value in tensors.items() if key != name}


def with_extra(name):
    return lambda tensors: {**tensors, name: torch.zeros(2)}


L, V = "language_model.model.layers.1.", "vision_tower.encoder.layers.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(L + "mlp.up_proj.weight"), rf"has no tensor {L}mlp.up_proj.weight"),
        (without("language_model.model.embed_tokens.weight"), "has no tensor language_model.model.embed_tokens"),
        (without("language_model.lm_head.weight"), "has no tensor language_model.lm_head.weight or lm_head.weight"),
        (without("multi_modal_projector.linear_2.bias"), "has no tensor multi_modal_projector.linear_2.bias"),
        (without("vision_tower.pre_layrnorm.bias"), "has no tensor vision_tower.pre_layrnorm.bias"),
        (without(V + "self_attn.v_proj.bias"), rf"has no tensor {V}self_attn.v_proj.bias"),
        (with_extra(V + "self_attn.qkv.weight"), rf"model does not know: {V}self_attn.qkv.weight"),
        (with_extra(L + "mlp.up_proj.qzeros"), rf"model does not know: {L}mlp.up_proj.qzeros"),
        (with_extra(L + "self_attn.q_proj.bias"), rf"model does not know: {L}self_attn.q_proj.bias"),
        (with_extra("vision_tower.adapter.weight"), "model does not know: vision_tower.adapter.weight"),
        (with_extra("multi_modal_projector.norm.weight"), "does not know: multi_modal_projector.norm.weight"),
    ],
)
def test_missing_and_unknown_tensors_are_named(saved, tmp_path, change, message) -> None:
    path = rewritten(saved, tmp_path, change)
    with pytest.raises(CheckpointError, match=message):
        load_all(path)


def test_a_wrong_shape_names_file_tensor_and_both_shapes(saved, tmp_path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 64
    path = rewritten(saved, tmp_path, dict)
    (path / "config.json").write_text(json.dumps(config))
    message = (
        r"model.safetensors: tensor \S+gate_proj.weight has shape \[56, 48\], the configuration asks for \[64, 48\]"
    )
    with pytest.raises(CheckpointError, match=message):
        load_all(path)


@pytest.mark.parametrize(
    "name",
    [
        L + "self_attn.rotary_emb.inv_freq",
        "vision_tower.embeddings.position_ids",
        "vision_tower.encoder.layers.7.mlp.fc1.weight",
        "vision_tower.post_layernorm.weight",
        "image_newline",
    ],
)
def test_tensors_known_to_be_unused_are_passed_over(saved, tmp_path, name) -> None:
    load_all(rewritten(saved, tmp_path, lambda tensors: {**tensors, name: torch.zeros(2)}))


LOAD = """
import json, sys
import torch
alone = set(sys.modules)
from dist_vlm.workers.comm import single_rank
from dist_vlm.workers.config import RankConfig
from dist_vlm.workers.runner import Runner
runner = Runner(RankConfig(**json.loads(sys.argv[1])), single_rank())
runner.load()
runner.allocate(4)
with torch.inference_mode():
    runner.vision.encode_pixels(torch.zeros(runner.spec.image_input_shape))
print(" ".join(set(sys.modules) - alone))
"""
# Seconds of a rank's start: what transformers' modules of a model import.
HEAVY = {"transformers", "scipy", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.tensor"}


@pytest.mark.parametrize("kernels", ["torch", "cpp"])
def test_a_rank_imports_no_transformers(tiny_checkpoint, kernels) -> None:
    config = dataclasses.asdict(rank_config(tiny_checkpoint, kernels=kernels))
    command = [sys.executable, "-c", LOAD, json.dumps(config)]
    told = subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout.split()
    assert "dist_vlm.workers.models.llava.vision" in told
    assert not HEAVY & set(told)
