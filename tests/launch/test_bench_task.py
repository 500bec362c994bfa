from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dist_vlm import ConfigError
from dist_vlm.launch.bench_task import Task


def task(error: Exception, prefix: str) -> Task:
    def fail(*_: Any) -> None:
        raise error

    module: Any = SimpleNamespace(check=fail, measure=fail)
    return Task("steps", module, None, prefix)


@pytest.mark.parametrize(
    ("error", "prefix", "text"),
    [
        (ConfigError("too many", field="batches", value=9, source="--batches"), "--", "--batches = 9: too many"),
        (
            ConfigError("too many", field="batches", value=9, source="--batches"),
            "--steps-",
            "--steps-batches = 9: too many",
        ),
        (
            ConfigError("too short", field="model.max_model_len", value=9),
            "--steps-",
            "model.max_model_len = 9: too short",
        ),
    ],
)
def test_an_error_names_the_flag_as_it_was_given(error: ConfigError, prefix: str, text: str) -> None:
    one: Any = task(error, prefix)
    for call in (one.check, one.measure):
        with pytest.raises(ConfigError) as caught:
            call(None)
        assert str(caught.value) == text
