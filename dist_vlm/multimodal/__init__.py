"""Data that accompanies a prompt's text."""

from __future__ import annotations

from dist_vlm.multimodal.image import ImageFeatureData, ImagePixelData

__all__ = ["ImageFeatureData", "ImagePixelData"]
