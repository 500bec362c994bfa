from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.config_load import load_config
from dist_vlm.config_server import ServerConfig
from dist_vlm.entrypoints import start
from dist_vlm.machine import usable_cores


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[EngineConfig, ServerConfig]]:
    """What the server is started with; it ends at once, with status 7."""
    calls: list[tuple[EngineConfig, ServerConfig]] = []
    stand_in: Any = ModuleType("dist_vlm.server.serve")
    stand_in.serve = lambda engine, server, client: calls.append((engine, server)) or 7
    monkeypatch.setitem(sys.modules, "dist_vlm.server.serve", stand_in)
    return calls


def test_the_server_gets_everything_decided(
    served: list[tuple[EngineConfig, ServerConfig]], tiny_facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_facts.parent)
    monkeypatch.setenv("DIST_VLM_API_KEY", "k")
    loaded = load_config(None, {"model": tiny_facts.name, "device": "cpu", "port": "0", "media_workers": "2"})
    assert start.start_server(loaded) == 7
    ((engine, server),) = served
    assert engine == loaded.resolve().replace(threads_per_rank=max(1, usable_cores() - 1))
    assert engine.model.model == str(tiny_facts)
    assert server == ServerConfig(
        port=0, api_key="k", image_fetch_timeout_s=5.0, served_model_name=tiny_facts.name, media_workers=2
    )


@pytest.mark.parametrize(("cores", "ranks", "threads"), [(1, 1, 1), (2, 1, 1), (2, 2, 1), (9, 2, 4), (8, 1, 7)])
def test_ranks_on_a_cpu_leave_a_core_to_the_server_unless_their_threads_are_given(
    served: list[Any], tiny_facts: Path, monkeypatch: pytest.MonkeyPatch, cores: int, ranks: int, threads: int
) -> None:
    monkeypatch.setattr(start, "usable_cores", lambda: cores)
    flags = {"model": str(tiny_facts), "device": "cpu", "tensor_parallel_size": str(ranks)}
    start.start_server(load_config(None, flags))
    start.start_server(load_config(None, flags | {"threads_per_rank": "3"}))
    start.start_server(load_config(None, flags | {"replicas": "2"}), lambda engine: None)  # type: ignore[arg-type]
    assert [engine.parallel.threads_per_rank for engine, _ in served] == [threads, 3, max(1, threads // 2)]


@pytest.mark.parametrize("kind", ["ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "chat_template"])
def test_a_file_that_is_not_there_is_named_before_anything_starts(
    kind: str, served: list[Any], tiny_facts: Path, tmp_path: Path
) -> None:
    there = tmp_path / "there.pem"
    there.write_text("x")
    tls = dict.fromkeys(("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"), str(there))
    flags = {"model": str(tiny_facts), **tls, kind: "/absent"}
    with pytest.raises(
        ConfigError, match=f"^--{kind.replace('_', '-')} = '/absent': (must be an existing|no such) file"
    ):
        start.start_server(load_config(None, flags))
    assert not served


def test_a_template_that_a_yaml_file_names_is_found_missing_there(
    served: list[Any], tiny_facts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(f"model: {{model: {tiny_facts}}}\nserver: {{chat_template: ./absent.jinja}}\n")
    with pytest.raises(ConfigError) as caught:
        start.start_server(load_config(str(file)))
    assert str(caught.value).startswith(f"{file}: server.chat_template = '/")
    assert "no such file" in str(caught.value)
    assert not served


def test_only_pictures_are_served(served: list[Any], tiny_facts: Path) -> None:
    facts = {"image_token_id": "32000", "image_input_shape": "1,3,56,56", "image_feature_size": "16"}
    flags = {"model": str(tiny_facts), "device": "cpu", **facts}
    with pytest.raises(ConfigError, match=r"^--image-input-type = 'image_features': a server takes pictures"):
        start.start_server(load_config(None, {**flags, "image_input_type": "image_features"}))
    assert not served
    assert start.start_server(load_config(None, {**flags, "image_input_type": "pixel_values"})) == 7


def test_missing_packages_are_named_with_the_way_to_get_them(
    served: list[Any], tiny_facts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("fastapi", "aiohttp") else found(name)
    )
    with pytest.raises(RuntimeError) as caught:
        start.start_server(load_config(None, {"model": str(tiny_facts), "device": "cpu"}))
    expected = "the server's packages are missing (fastapi, aiohttp): pip install 'dist-vlm[server]'"
    assert str(caught.value) == expected
    assert not served
