from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.checks import check_dense, check_dtype, check_rows, check_shape


def test_none_stands_for_any_size() -> None:
    check_shape("op", "x", torch.zeros(3, 4), (None, 4))
    with pytest.raises(ValueError, match=r"op: x has shape \[3, 4\], must be \[any, 5\]"):
        check_shape("op", "x", torch.zeros(3, 4), (None, 5))
    with pytest.raises(ValueError, match=r"must be \[3\]"):
        check_shape("op", "x", torch.zeros(3, 4), (3,))


def test_dtype_and_layout() -> None:
    with pytest.raises(TypeError, match=r"must be torch.float16"):
        check_dtype("op", "x", torch.zeros(1), torch.float16)
    with pytest.raises(ValueError, match="must be contiguous"):
        check_dense("op", "x", torch.zeros(3, 4).T)
    check_rows("op", "x", torch.zeros(3, 4)[::2])
    with pytest.raises(ValueError, match="its last axis must be dense"):
        check_rows("op", "x", torch.zeros(3, 4).T)
