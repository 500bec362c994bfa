from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.logit_bias import add_bias


def test_each_bias_is_added_to_its_own_logit() -> None:
    logits = torch.randn(3, 11, generator=torch.Generator().manual_seed(0))
    cells = {(0, 4): 2.5, (2, 0): -100.0, (2, 10): 0.25}
    expected = logits.tolist()
    for (row, token), bias in cells.items():
        expected[row][token] = (logits[row, token] + torch.tensor(bias)).item()
    rows, ids = torch.tensor(list(cells)).unbind(1)
    add_bias(logits, rows=rows, ids=ids, bias=torch.tensor(list(cells.values())))
    assert logits.tolist() == expected


def test_wrong_arguments_are_refused() -> None:
    logits, pair = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"add_bias: ids has shape \[2\], must be \[1\]"):
        add_bias(logits, rows=pair[:1], ids=pair, bias=torch.zeros(1))
    with pytest.raises(TypeError, match=r"rows has dtype torch.int32"):
        add_bias(logits, rows=pair.int(), ids=pair, bias=torch.zeros(2))
