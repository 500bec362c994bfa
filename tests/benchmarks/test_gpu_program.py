from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path

import gpu_program
import pytest
import torch


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    made.add_argument("--rows", type=int, default=1)
    return made


def test_what_is_measured_is_written_beside_what_it_was_measured_with(
    parser: argparse.ArgumentParser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(sys, "argv", ["program", "--rows", "3", "--commit", "abc", "--out", str(out)])
    gpu_program.run(parser, lambda arguments: {"rows": arguments.rows})
    found = json.loads(out.read_text())
    assert found.pop("software")["torch"] == torch.__version__
    assert found == {
        "date": datetime.date.today().isoformat(),
        "commit": "abc",
        "device": "NVIDIA H200",
        "rows": 3,
    }


def test_without_a_gpu_nothing_is_measured(
    parser: argparse.ArgumentParser, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["program"])
    with pytest.raises(SystemExit):
        gpu_program.run(parser, lambda arguments: pytest.fail("measured"))
    assert "torch sees no GPU here" in capsys.readouterr().err
