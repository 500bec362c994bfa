from __future__ import annotations

import torch

from dist_vlm.workers.models.family import VisionModel
from dist_vlm.workers.recorded_vision import RecordedVision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Doubling(VisionModel):
    """Counts its calls: a recording makes two on a GPU, and none afterwards."""

    def __init__(self) -> None:
        self.module = torch.nn.Identity()
        self.calls: list[int] = []

    def encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.calls.append(pixel_values.shape[0])
        return 2 * pixel_values

    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        return 3 * features


def test_every_batch_is_encoded_anew() -> None:
    real = Doubling()
    vision = RecordedVision(real, device=DEVICE)
    for count in (1, 2, 1, 4, 2, 1):
        pixels = torch.randn(count, 3, 4, 4, device=DEVICE)
        torch.testing.assert_close(vision.encode_pixels(pixels), 2 * pixels)
    if DEVICE.type == "cuda":
        assert real.calls == [1, 1, 2, 2, 4, 4]


def test_great_batches_and_features_go_straight_through() -> None:
    real = Doubling()
    vision = RecordedVision(real, device=DEVICE)
    for count in (0, 5, 9):
        pixels = torch.randn(count, 3, 2, 2, device=DEVICE)
        torch.testing.assert_close(vision.encode_pixels(pixels), 2 * pixels)
    assert real.calls == [0, 5, 9]
    torch.testing.assert_close(vision.project_features(torch.ones(2, 3)), 3 * torch.ones(2, 3))


def test_batches_recorded_ahead_are_not_recorded_again() -> None:
    class Noting(Doubling):
        def encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
            self.tf32 = torch.backends.cudnn.allow_tf32
            return super().encode_pixels(pixel_values)

    real = Noting()
    vision = RecordedVision(real, device=DEVICE)
    vision.record((2, 1), shape=(3, 4, 4), dtype=torch.float32)
    assert real.calls == [2, 2, 1, 1] and not real.tf32
    pixels = torch.randn(2, 3, 4, 4, device=DEVICE)
    torch.testing.assert_close(vision.encode_pixels(pixels), 2 * pixels)
    assert real.calls == ([2, 2, 1, 1] if DEVICE.type == "cuda" else [2, 2, 1, 1, 2])
    vision.record((1,), shape=(3, 5, 5), dtype=torch.bfloat16)
    assert real.tf32
