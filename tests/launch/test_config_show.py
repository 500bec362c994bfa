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


def test_the_servers_section_is_shown_where_the_file_has_one_or_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_VLM_IMAGE_FETCH_TIMEOUT", "7")
    file = launch_file(tmp_path, tiny_facts)
    assert "server:" not in show(capsys, file)
    asked = show(capsys, file, "--server")
    assert f"  served_model_name: {tiny_facts}\n" in asked
    assert "  image_fetch_timeout_s: 7.0\n" in asked
    with_server = tmp_path / "server.yaml"
    with_server.write_text(Path(file).read_text() + "server: {port: 9, served_model_name: m}\n")
    text = show(capsys, str(with_server))
    assert "  port: 9\n" in text
    again = tmp_path / "again.yaml"
    again.write_text(text)
    loaded = load_config(str(again))
    assert loaded.config == load_config(file).resolve()
    assert loaded.server == load_config(str(with_server)).resolve_server({"DIST_VLM_IMAGE_FETCH_TIMEOUT": "7"})


def test_the_servers_sources_are_told_and_no_key(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    file = tmp_path / "server.yaml"
    file.write_text(f"model: {{model: {tiny_facts}}}\nserver: {{port: 9}}\n")
    text = show(capsys, str(file), "--sources")
    lines = text.splitlines()
    assert f"  port: 9  # {file}" in lines
    assert "  host: 127.0.0.1  # default" in lines
    assert f"  served_model_name: {tiny_facts}  # resolved" in lines
    assert "  # api_key is set, and not shown: VLLM_API_KEY" in lines
    assert "s3cret" not in text


def test_a_wrong_variable_is_told_by_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "soon")
    assert cli.main(["config", "show", launch_file(tmp_path, tiny_facts), "--server"]) == 2
    assert capsys.readouterr().err.startswith("dist-vlm: error: VLLM_IMAGE_FETCH_TIMEOUT = 'soon': must be a number")
