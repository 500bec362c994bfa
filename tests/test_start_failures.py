"""A start that fails: one message that names rank, stage and cause, within the deadline, and nothing left running.

Each case is a program of its own, as a user would run it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROGRAM = """
import json, sys
from dist_vlm import LLM
try:
    values = {"device": "cpu", **json.loads(sys.argv[2])}
    LLM(sys.argv[1], tensor_parallel_size=2, max_model_len=128, start_timeout_s=120, **values)
except Exception as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(3)
"""


def start(model: Path, arguments: str, *, tag: str) -> tuple[str, str, float]:
    """What the program printed on each stream, and how long it took. It must fail, and leave no process."""
    environment = os.environ | {"DIST_VLM_TEST_TAG": tag}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(model), arguments],
        env=environment, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    seconds = time.monotonic() - began
    assert done.returncode == 3, done.stderr
    assert not tagged(tag), "processes are left"
    return done.stdout, done.stderr, seconds


def tagged(tag: str, within_s: float = 20.0) -> list[str]:
    """Live processes that inherited the program's environment, after a moment to end."""
    end = time.monotonic() + within_s
    while True:
        found = []
        for process in Path("/proc").iterdir():
            try:
                if f"DIST_VLM_TEST_TAG={tag}".encode() in (process / "environ").read_bytes():
                    found.append((process / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def damaged(checkpoint: Path, out: Path, *, rename: tuple[str, str]) -> Path:
    """A copy of the checkpoint in which one tensor has another name."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, out, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors[rename[1]] = tensors.pop(rename[0])
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.timeout(240)
def test_missing_weights(tiny_facts: Path) -> None:
    out, errors, seconds = start(tiny_facts, "{}", tag="weights")
    assert out.count("\n") == 1
    assert out.startswith("StartError: load failed (rank ")
    assert "safetensors" in out
    assert str(tiny_facts) in out
    assert "Traceback" not in errors
    assert seconds < 110


@pytest.mark.timeout(240)
def test_a_bad_tensor_name(tiny_checkpoint: Path, tmp_path: Path) -> None:
    good = "language_model.model.layers.1.self_attn.o_proj.weight"
    model = damaged(tiny_checkpoint, tmp_path / "model", rename=(good, good.replace("o_proj", "oh_proj")))
    out, errors, seconds = start(model, "{}", tag="tensor")
    assert out.count("\n") == 1
    assert out.startswith("StartError: load failed (rank ")
    assert good in out
    assert "Traceback" not in errors
    assert seconds < 110


@pytest.mark.timeout(240)
def test_too_few_gpus(tiny_facts: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    out, errors, seconds = start(tiny_facts, '{"device": "cuda"}', tag="gpus")
    assert out.count("\n") == 1
    assert out.startswith("StartError: placement failed (no rank yet): ")
    assert "GPU" in out
    assert "Traceback" not in errors
    assert seconds < 110


@pytest.mark.timeout(240)
def test_ray_not_reachable(tiny_facts: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    out, errors, seconds = start(tiny_facts, f'{{"ray_address": "{address}"}}', tag="ray")
    assert out.count("\n") == 1
    assert out.startswith("StartError: ray failed (no rank yet): ")
    assert address in out
    assert "Traceback" not in errors
    assert seconds < 30
