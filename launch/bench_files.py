"""Where `dist-vlm bench` writes figures: a file, or a folder with one for each measurement."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_vlm.config import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """What a flag names. flag: "--out". ending: of its files. is_folder: whether each measurement has a file in it."""

    flag: str
    path: str
    ending: str
    is_folder: bool

    def check(self) -> None:
        """Raises `ConfigError` where nothing could be written once all is measured. Makes a folder that is not there,
        in one that is."""
        if self.is_folder:
            self._make()
        elif not os.path.isdir(os.path.dirname(self.path) or ".") or os.path.isdir(self.path):
            raise self._error("must be a file in an existing directory")
        elif not _can_be_written(self.path):
            raise self._error("must be a file that can be written")
        elif self.flag == "--plot" and not self.path.endswith(self.ending):
            raise self._error(f"must end in {self.ending}: no other form is drawn")

    def write(self, name: str, text: str) -> None:
        """name: of the measurement."""
        path = Path(self.path, name + self.ending) if self.is_folder else Path(self.path)
        path.write_text(text, encoding="utf-8")

    def _make(self) -> None:
        if os.path.isdir(self.path):
            if not os.access(self.path, os.W_OK | os.X_OK):
                raise self._error("must be a directory that can be written to")
            return
        try:
            os.mkdir(self.path)
        except OSError as error:
            raise self._error(f"must be a directory, or a new one in another ({error.strerror})") from None

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(problem, field=self.flag.removeprefix("--"), value=self.path, source=self.flag)


def _can_be_written(path: str) -> bool:
    if os.path.exists(path):
        return os.access(path, os.W_OK)
    return os.access(os.path.dirname(path) or ".", os.W_OK | os.X_OK)
