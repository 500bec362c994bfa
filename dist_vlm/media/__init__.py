"""Picture intake: decoding, limits, content keys."""

from __future__ import annotations

from dist_vlm.media.content_key import content_key
from dist_vlm.media.picture import DEFAULT_MAX_PIXELS, PictureError, load_image, to_rgb

__all__ = ["DEFAULT_MAX_PIXELS", "PictureError", "content_key", "load_image", "to_rgb"]
