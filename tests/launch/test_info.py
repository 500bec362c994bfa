from __future__ import annotations

import json
from importlib.metadata import version

import pytest
import torch

from dist_vlm.launch import cli, info
from dist_vlm.machine import usable_cores


def test_the_facts_are_those_of_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == version("torch")
    assert facts["packages"]["ray"] == version("ray")
    assert facts["cores"] == usable_cores()
    assert facts["torch_cuda_devices"] == torch.cuda.device_count()
    assert set(facts["kernels"]) == {"reference", "torch", "cpp"}
    assert "paged_attention" in facts["kernels"]["reference"]


def test_the_text_has_every_fact_on_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    for name in info.collect():
        assert f"{name}:" in text
    assert f"  torch: {version('torch')}\n" in text


def test_a_missing_package_is_none(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "PACKAGES", ("no-such-package-anywhere",))
    assert cli.main(["info"]) == 0
    assert "  no-such-package-anywhere: none\n" in capsys.readouterr().out
