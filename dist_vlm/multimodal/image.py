"""The two forms in which a prompt's image may enter the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    import torch


class ImagePixelData:
    """A picture, or pixel values that are preprocessed already.

    image: a PIL picture of any mode and size, or a float tensor [channels, height, width] or
        [1, channels, height, width] of exactly the model's input shape.
    """

    def __init__(self, image: Image.Image | torch.Tensor) -> None:
        self.image = image

    def __repr__(self) -> str:
        if isinstance(self.image, Image.Image):
            return f"ImagePixelData(image=<{self.image.mode} {self.image.size[0]}x{self.image.size[1]}>)"
        return f"ImagePixelData(image=<tensor {tuple(self.image.shape)}>)"


class ImageFeatureData:
    """The vision tower's output for one image, before the projector.

    image_features: a float tensor [1, rows, width] or [rows, width]: rows are the image's placeholder tokens,
        width is the vision tower's hidden size (times its feature layers, where there are several).
    """

    def __init__(self, image_features: torch.Tensor) -> None:
        self.image_features = image_features

    def __repr__(self) -> str:
        return f"ImageFeatureData(image_features=<tensor {tuple(self.image_features.shape)}>)"
