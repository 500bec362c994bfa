"""Slices against whole tensors, bytes read, and what a damaged checkpoint says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from dist_vlm.workers import safetensors_source
from dist_vlm.workers.models import CheckpointError
from dist_vlm.workers.safetensors_source import SafetensorsSource


@pytest.fixture
def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "matrix": torch.randn(37, 53, generator=generator),
        "half": torch.randn(12, 10, generator=generator).bfloat16(),
        "vector": torch.randn(41, generator=generator).half(),
        "kernel": torch.randn(6, 3, 2, 2, generator=generator),
        "count": torch.arange(4),
    }


@pytest.fixture
def directory(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


SLICES = [
    (slice(None), slice(None)),
    (slice(5, 20), slice(None)),
    (slice(None), slice(7, 31)),
    (slice(36, 37), slice(52, 53)),
    (slice(3, 3), slice(None)),
]


@pytest.mark.parametrize("index", SLICES)
@pytest.mark.parametrize("chunk_bytes", [1, 600, 2**22])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_slice_equals_the_tensors_own_and_reads_no_more(
    directory, tensors, index, chunk_bytes, dtype, monkeypatch
) -> None:
    monkeypatch.setitem(safetensors_source.CHUNK_BYTES, "cpu", chunk_bytes)
    expected = tensors["matrix"][index]
    target = torch.zeros(expected.shape, dtype=dtype)
    with SafetensorsSource(directory) as source:
        source.copy_into(target, "matrix", shape=(37, 53), index=index)
        assert source.bytes_read == expected.numel() * 4
    assert torch.equal(target, expected.to(dtype))


@pytest.mark.parametrize("name", ["half", "vector", "kernel"])
def test_other_shapes_and_dtypes(directory, tensors, name) -> None:
    target = torch.zeros(tensors[name].shape)
    with SafetensorsSource(directory) as source:
        source.copy_into(target, name, shape=tuple(tensors[name].shape))
    assert torch.equal(target, tensors[name].float())


def test_a_part_of_a_larger_parameter_is_filled(directory, tensors) -> None:
    target = torch.zeros(50, 53)
    with SafetensorsSource(directory) as source:
        source.copy_into(target[10:47], "matrix", shape=(37, 53))
    assert torch.equal(target[10:47], tensors["matrix"])
    assert not target[:10].any()
    assert not target[47:].any()


def shard(directory, tensors) -> None:
    """Two files and an index, in place of the single file."""
    (directory / "model.safetensors").unlink()
    save_file({"matrix": tensors["matrix"]}, directory / "a.safetensors")
    save_file({"vector": tensors["vector"]}, directory / "b.safetensors")
    weight_map = {"matrix": "a.safetensors", "vector": "b.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_sharded_files_are_found_by_their_index(directory, tensors) -> None:
    shard(directory, tensors)
    target = torch.zeros(41)
    with SafetensorsSource(directory) as source:
        assert source.names() == {"matrix", "vector"}
        source.copy_into(target, "vector", shape=(41,))
    assert torch.equal(target, tensors["vector"].float())


def test_no_file_stays_open(directory) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with SafetensorsSource(directory) as source:
        source.copy_into(torch.zeros(37, 53), "matrix", shape=(37, 53))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("absent", (2,), "has no tensor absent"),
        ("matrix", (53, 37), r"model.safetensors: tensor matrix has shape \[37, 53\], the configuration asks for"),
        ("count", (4,), "tensor count has dtype I64, must be one of F32, BF16, F16"),
    ],
)
def test_a_wrong_tensor_is_named(directory, name, shape, message) -> None:
    with SafetensorsSource(directory) as source, pytest.raises(CheckpointError, match=message):
        source.copy_into(torch.zeros(shape), name, shape=shape)


def test_a_truncated_file_is_named(directory) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated: tensor \w+ ends at byte"):
        SafetensorsSource(directory)


def test_a_file_cut_while_it_is_read_is_named(directory) -> None:
    source = SafetensorsSource(directory)
    os.truncate(directory / "model.safetensors", 1000)
    with source, pytest.raises(CheckpointError, match="it ends inside tensor matrix"):
        source.copy_into(torch.zeros(37, 53), "matrix", shape=(37, 53))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file, or is truncated: 0 bytes"),
        (b"\x80\x04 a pickle, say", "is not a safetensors file"),
        (b"\x02\0\0\0\0\0\0\0[]", "its header is not a JSON object"),
        (b"\x0c\0\0\0\0\0\0\0" + b'{"w": "bad"}', "the header of tensor w is damaged"),
    ],
)
def test_something_else_than_safetensors_is_refused(tmp_path, content, message) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vector": "c.safetensors"}, "c.safetensors is missing; model.safetensors.index.json lists vector in it"),
        ({"vector": "a.safetensors"}, "a.safetensors has no tensor vector; model.safetensors.index.json lists it"),
        ({"vector": "../b.safetensors"}, "vector lies in '../b.safetensors', must be a file of that directory"),
    ],
)
def test_an_index_that_does_not_fit_its_files_is_refused(directory, tensors, change, message) -> None:
    shard(directory, tensors)
    index = {"weight_map": {"matrix": "a.safetensors", **change}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        SafetensorsSource(directory)


def test_an_index_without_a_map_is_refused(directory, tensors) -> None:
    shard(directory, tensors)
    (directory / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not JSON with a weight_map"):
        SafetensorsSource(directory)


@pytest.mark.gpu
@pytest.mark.parametrize("index", SLICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_parameter_is_filled(directory, tensors, index, dtype) -> None:
    expected = tensors["matrix"][index]
    target = torch.zeros(expected.shape, dtype=dtype, device="cuda")
    with SafetensorsSource(directory) as source:
        source.copy_into(target, "matrix", shape=(37, 53), index=index)
    assert torch.equal(target.cpu(), expected.to(dtype))


# What is read at once, and what a first use of torch in the process takes beside it.
BUFFER_BYTES = 4 << 20

PEAK = """
import sys
from pathlib import Path
import torch
from dist_vlm.workers.peak_memory import PeakMemory
from dist_vlm.workers.safetensors_source import SafetensorsSource
columns = slice(0, 512)
with SafetensorsSource(Path(sys.argv[1])) as source:
    source.copy_into(torch.empty(4, 512), "warm", shape=(4, 1024), index=(slice(None), columns))
    peak = PeakMemory(torch.device("cpu"))
    parts = [torch.empty(4096, 512, dtype=getattr(torch, sys.argv[2])) for _ in range(8)]
    for index, part in enumerate(parts):
        source.copy_into(part, f"w{index}", shape=(4096, 1024), index=(slice(None), columns))
    print(peak.growth_bytes(), sum(part.nbytes for part in parts), source.bytes_read)
"""


@pytest.mark.parametrize(("dtype", "factor"), [("float32", 1.0), ("bfloat16", 0.5)])
def test_the_peak_while_loading_is_the_parameters_and_a_buffer(tmp_path, dtype, factor) -> None:
    """Half the columns of a 128 MiB file: neither mapped pages nor a second copy of them becomes resident."""
    tensors = {f"w{index}": torch.ones(4096, 1024) for index in range(8)}
    save_file({**tensors, "warm": torch.ones(4, 1024)}, tmp_path / "model.safetensors")
    run = [sys.executable, "-c", PEAK, str(tmp_path), dtype]
    output = subprocess.run(run, check=True, capture_output=True, text=True, timeout=100).stdout
    peak, held, read = (int(word) for word in output.split())
    assert held == factor * 64 * 2**20
    assert read == 64 * 2**20 + 4 * 512 * 4
    assert 0.99 * held <= peak <= held + BUFFER_BYTES
