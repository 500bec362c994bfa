from __future__ import annotations

from pathlib import Path

import pytest

from dist_vlm.config_load import LoadedConfig
from dist_vlm.launch import cli, serve


def test_a_file_and_flags_start_the_server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[LoadedConfig] = []
    monkeypatch.setattr(serve, "start_server", lambda loaded, make_client: started.append(loaded) or 3)
    file = tmp_path / "launch.yaml"
    file.write_text("model: {model: /m}\nserver: {port: 9, host: 0.0.0.0}\n")
    words = ["serve", "--config", str(file), "--port", "10", "-tp", "2", "--served-model-name", "n", "--log-prompts"]
    assert cli.main(words) == 3, "the server's own status"
    (loaded,) = started
    assert (loaded.server.host, loaded.server.port, loaded.server.served_model_name) == ("0.0.0.0", 10, "n")
    assert loaded.server.log_prompts
    assert (loaded.config.model.model, loaded.config.parallel.tensor_parallel_size) == ("/m", 2)


def test_a_model_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[LoadedConfig] = []
    monkeypatch.setattr(serve, "start_server", lambda loaded, make_client: started.append(loaded) or 0)
    assert cli.main(["serve", "--model", "/m"]) == 0
    assert started[0].config.model.model == "/m"
