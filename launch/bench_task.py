"""One measurement that a command line of `dist-vlm bench` asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dist_vlm.config import ConfigError

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.launch.bench_engine import MeasuredEngine
    from dist_vlm.launch.bench_figures import Report


@dataclass(frozen=True, slots=True)
class Task:
    """name, module: of the measurement. chosen: its settings. prefix: what its flags begin with on the line."""

    name: str
    module: ModuleType
    chosen: Any
    prefix: str = "--"

    def check(self, config: EngineConfig) -> None:
        """Raises `ConfigError`. config: resolved."""
        with self._flags_as_given():
            self.module.check(config, self.chosen)

    def measure(self, engine: MeasuredEngine) -> Report:
        """Raises `ConfigError` for what only a started engine can tell, and `RuntimeError`."""
        with self._flags_as_given():
            report: Report = self.module.measure(engine, self.chosen)
        return report

    @contextmanager
    def _flags_as_given(self) -> Iterator[None]:
        try:
            yield
        except ConfigError as error:
            if self.prefix == "--" or not error.source.startswith("--"):
                raise
            flag = self.prefix + error.source.removeprefix("--")
            raise ConfigError(error.problem, field=error.field, value=error.value, source=flag) from None
