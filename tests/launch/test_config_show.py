from __future__ import annotations

from pathlib import Path

import pytest

from dist_vlm.config_load import load_config
from dist_vlm.launch import cli


def show(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["config", "show", *words]) == 0
    return capsys.readouterr().out


def launch_file(folder: Path, model: Path | str) -> str:
    file = folder / "launch.yaml"
    file.write_text(f"model: {{model: {model}, dtype: half}}\nparallel: {{tensor_parallel_size: 2, device: cpu}}\n")
    return str(file)


def test_a_resolved_configuration_is_printed_and_loads_to_itself(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_facts: Path
) -> None:
    file = launch_file(tmp_path, tiny_facts)
    text = show(capsys, file, "--max-num-seqs", "3")
    assert "  max_num_seqs: 3\n" in text
    assert "  max_model_len: 2048\n" in text
    assert "  image_input_shape: [1, 3, 56, 56]\n" in text
    assert "auto" not in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    assert load_config(str(again)).config == load_config(file, {"max_num_seqs": "3"}).resolve()


def test_sources_are_told_on_request(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_facts: Path) -> None:
    file = launch_file(tmp_path, tiny_facts)
    lines = show(capsys, file, "--sources", "--max-num-seqs", "3", "--load-format", "auto").splitlines()
    assert f"  dtype: float16  # {file}" in lines
    assert "  max_num_seqs: 3  # --max-num-seqs" in lines
    assert "  load_format: safetensors  # --load-format, resolved" in lines
    assert "  max_model_len: 2048  # resolved" in lines
    assert "  block_size: 16  # default" in lines


def test_a_missing_checkpoint_is_an_error_unless_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = launch_file(tmp_path, "/absent/m")
    assert cli.main(["config", "show", file]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"{file}: model.model = '/absent/m'" in err
    text = show(capsys, file, "--no-checkpoint")
    assert "  model: /absent/m\n" in text
    assert "  max_model_len: null\n" in text
    assert "  kv_cache_memory_gib: 1.0\n" in text
