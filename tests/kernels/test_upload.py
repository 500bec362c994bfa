from __future__ import annotations

import pytest
import torch

from dist_vlm.kernels.upload import upload


def test_values_keep_their_shape_and_precision() -> None:
    device = torch.device("cpu")
    big = 2**63 - 1
    table = upload([[big, 2], [3, 4]], torch.int64, device)
    assert table.tolist() == [[big, 2], [3, 4]]
    assert upload([0.1], torch.float64, device).item() == 0.1
    assert upload([0.1], torch.float32, device).dtype == torch.float32


@pytest.mark.gpu
def test_an_upload_does_not_wait_for_the_device() -> None:
    device = torch.device("cuda")
    torch.zeros(1, device=device)
    done = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)
    done.record()
    values = upload([1.0, 2.0], torch.float32, device)
    assert not done.query()
    assert values.tolist() == [1.0, 2.0]
