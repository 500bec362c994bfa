"""Every activation against the module that transformers has under its name."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from dist_vlm.workers.models.llava.activations import FUNCTIONS, activation
from dist_vlm.workers.models.llava.config import ACTIVATIONS

from .rig import OPS

# They have parameters of their own, and no place in a checkpoint's tower or projector.
LEARNED = {"prelu", "xielu"}


def test_the_names_allowed_are_those_computed_and_all_that_transformers_has() -> None:
    assert set(FUNCTIONS) | {"quick_gelu"} == set(ACTIVATIONS) == set(ACT2FN) - LEARNED


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_are_those_of_transformers(name) -> None:
    x = torch.linspace(-12, 12, 4001).view(1, -1, 1)
    kept = x.clone()
    torch.testing.assert_close(activation(name, OPS)(x), ACT2FN[name](x), atol=1e-6, rtol=1e-5)
    assert torch.equal(x, kept), "the input is its caller's"


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_in_bfloat16_no_value_is_farther_off_than_transformers(name) -> None:
    x = torch.linspace(-6, 6, 4001).bfloat16()
    exact = ACT2FN[name](x.float())
    ours, theirs = activation(name, OPS)(x), ACT2FN[name](x)
    assert ours.dtype == torch.bfloat16
    assert (ours.float() - exact).abs().max() <= (theirs.float() - exact).abs().max()
