from __future__ import annotations

import pytest

from dist_vlm.workers.dummy_source import DummySource
from dist_vlm.workers.models import CheckpointError
from dist_vlm.workers.models.llava.weight_names import (
    HEAD_PREFIXES,
    LANGUAGE_PREFIXES,
    find_prefix,
    language_table,
    vision_ignored,
    vision_names,
)


class Names(DummySource):
    """Knows the names it is given."""

    def __init__(self, *names: str) -> None:
        super().__init__(0)
        self._names = frozenset(names)

    def has(self, name: str) -> bool:
        return name in self._names


def test_a_component_is_found_under_the_prefix_that_the_checkpoint_has() -> None:
    source = Names("model.language_model.embed_tokens.weight", "lm_head.weight")
    assert find_prefix(source, LANGUAGE_PREFIXES, "embed_tokens.weight") == "model.language_model."
    assert find_prefix(source, HEAD_PREFIXES, "lm_head.weight") == ""


def test_every_name_tried_is_told() -> None:
    message = "no tensor language_model.model.norm.weight or model.language_model.norm.weight"
    with pytest.raises(CheckpointError, match=message):
        find_prefix(Names(), LANGUAGE_PREFIXES, "norm.weight")


def test_the_table_fuses_projections_in_the_order_of_the_modules() -> None:
    table = language_table(2, prefix="p.", head="h.lm_head")
    assert table["layers.1.qkv"] == tuple(f"p.layers.1.self_attn.{name}_proj" for name in "qkv")
    assert table["layers.0.gate_up"] == ("p.layers.0.mlp.gate_proj", "p.layers.0.mlp.up_proj")
    assert table["head"] == ("h.lm_head",)
    assert len(table) == 3 + 2 * 6
    assert "head" not in language_table(2, prefix="p.", head=None)


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("encoder.layers.22.mlp.fc1.weight", False),
        ("encoder.layers.23.mlp.fc1.weight", True),
        ("post_layernorm.bias", True),
        ("embeddings.position_ids", True),
        ("embeddings.class_embedding", False),
        ("encoder.layers.extra", False),
    ],
)
def test_unneeded_parts_of_a_tower(name, ignored) -> None:
    assert vision_ignored(name, 23) is ignored


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("encoder.layers.3.self_attn.qkv.bias", [f"encoder.layers.3.self_attn.{one}_proj.bias" for one in "qkv"]),
        ("encoder.layers.3.self_attn.out_proj.bias", ["encoder.layers.3.self_attn.out_proj.bias"]),
        ("linear_1.weight", ["linear_1.weight"]),
    ],
)
def test_what_is_fused_in_the_tower(name, expected) -> None:
    assert list(vision_names(name)) == expected
