from __future__ import annotations

import io
import json
import mmap
from pathlib import Path

import large_pictures
import pytest
from PIL import Image

INLINE = ["--executor", "inline", "--device", "cpu", "--kv-cache-memory-gib", "0.02", "--threads-per-rank", "1"]


def test_each_number_has_a_picture_of_its_own() -> None:
    files = [large_pictures.file_of(number, 100) for number in range(3)]
    assert len(set(files)) == 3
    assert {Image.open(io.BytesIO(file)).size for file in files} == {(100, 100)}
    assert files[1] == large_pictures.file_of(1, 100)


def test_the_peak_is_that_since_it_was_reset() -> None:
    # Of the kernel, for an allocator may keep what is freed.
    with mmap.mmap(-1, 64 << 20) as block:
        block.write(b"x" * len(block))
        _, most = large_pictures.resident()
    large_pictures.reset_peak()
    now, after = large_pictures.resident()
    assert now <= after < most - (32 << 20)


def test_large_ones_are_answered_beside_small_ones(
    tiny_facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--pictures", "3", "--side", "2048", "--small-side", "64", "--output-tokens", "2", "--commit", "abc"]
    out = tmp_path / "out.json"
    large_pictures.main(["--model", str(tiny_facts), "--load-format", "dummy", *INLINE, *words, "--out", str(out)])
    found = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == found
    assert (found["benchmark"], found["settings"]["pictures"]) == ("large_pictures", 3)
    small, large = found["small"], found["large"]
    assert (small["side"], large["side"]) == (64, 2048)
    assert large["decoded_bytes_held_by_the_caller"] == 3 * 4 * 2048**2
    # What was decoded is in memory, whole.
    assert large["driver_peak_growth_bytes"] > 0.8 * large["decoded_bytes_held_by_the_caller"]
    assert found["slower_by"] == pytest.approx(large["seconds"] / small["seconds"], rel=0.2)
