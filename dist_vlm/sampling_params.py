"""The seed's module path of `SamplingParams`."""

from __future__ import annotations

from dist_vlm.sampling import SamplingParams

__all__ = ["SamplingParams"]
