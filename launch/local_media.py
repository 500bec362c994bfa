"""Pictures that a file of requests names: files below one directory, and data: URLs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


class LocalMedia:
    """Opens no file outside `root`, whatever the name says and wherever a link in it leads.

    root: relative names start here. max_pixels: largest picture accepted.
    """

    def __init__(self, root: Path, *, max_pixels: int) -> None:
        self._root = root.resolve()
        self._max_pixels = max_pixels

    def load(self, name: Any) -> Image.Image:
        """The picture of a file name or of a data: URL, in RGB. Raises `ValueError` saying what is wrong with it."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"{short(name)} is no picture: must be the name of a file, an http(s) or a data: URL")
        from dist_vlm.media import load_image, to_rgb
        from dist_vlm.media.picture_source import open_data_url

        if is_data_url(name):
            picture = open_data_url(name, name=short(name), max_pixels=self._max_pixels)
            return to_rgb(picture, max_pixels=self._max_pixels, name=short(name))
        if _SCHEME.match(name):
            raise ValueError(f"{short(name)}: must be the name of a file, an http(s) or a data: URL")
        return load_image(self._file(name), max_pixels=self._max_pixels)

    def _file(self, name: str) -> Path:
        try:
            file = (self._root / name).resolve()
            inside, is_file = file.is_relative_to(self._root), file.is_file()
        except (OSError, ValueError, RuntimeError):  # too long, a NUL in it, links that lead in a circle
            raise ValueError(f"{short(name)} is not the name of a file") from None
        if not inside:
            raise ValueError(f"{short(name)} leads out of {self._root}, the only directory that pictures are read from")
        if not is_file:
            raise ValueError(f"{short(name)}: there is no such file in {self._root}")
        return file


def is_data_url(name: str) -> bool:
    return name[:5].lower() == "data:"


def short(value: Any) -> str:
    """What messages call a picture."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."
