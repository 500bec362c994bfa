from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest
import triton

from dist_vlm.kernels.triton_support import triton_found, triton_interpreted


@pytest.mark.parametrize(
    "value", [None, "", "0", "1", "true", "True", "false", "on", "ON", "off", "yes", "y", "no", "2"]
)
def test_the_variable_is_read_as_triton_reads_it(value, monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert triton_interpreted() == bool(triton.knobs.runtime.interpret)


def test_found_where_it_can_be_imported(monkeypatch) -> None:
    assert triton_found()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not triton_found()


def test_asking_imports_neither_triton_nor_torch() -> None:
    code = (
        "import sys; from dist_vlm.kernels.triton_support import triton_found; triton_found();"
        "print(sorted({'torch', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
