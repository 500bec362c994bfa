from __future__ import annotations

import pytest

from dist_vlm import config_environment
from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.config_environment import api_key, image_fetch_timeout_s, resolved_server, sources_of
from dist_vlm.config_server import ServerConfig

ENGINE = EngineConfig.from_fields(model="checkpoints/m")


def test_the_key_comes_from_our_variable_then_from_vllms() -> None:
    assert api_key({}) is None
    assert api_key({"VLLM_API_KEY": "theirs"}) == "theirs"
    assert api_key({"VLLM_API_KEY": "theirs", "DIST_VLM_API_KEY": "ours"}) == "ours"


@pytest.mark.parametrize("value", ["", " ", "two words", "sk-secret\n", "clé"])
@pytest.mark.parametrize("name", ["DIST_VLM_API_KEY", "VLLM_API_KEY"])
def test_a_key_that_no_client_could_send_is_refused_and_not_shown(name: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        api_key({name: value})
    expected = f"{name}: must be a string of visible ASCII characters, without spaces, or not set at all"
    assert str(caught.value) == expected


def test_the_fetch_timeout_comes_from_our_variable_then_from_vllms() -> None:
    assert image_fetch_timeout_s({}) == 5.0
    assert image_fetch_timeout_s({"VLLM_IMAGE_FETCH_TIMEOUT": "8"}) == 8.0
    assert image_fetch_timeout_s({"DIST_VLM_IMAGE_FETCH_TIMEOUT": "0.5", "VLLM_IMAGE_FETCH_TIMEOUT": "8"}) == 0.5


@pytest.mark.parametrize("value", ["", "soon", "0", "-1", "nan", "inf"])
@pytest.mark.parametrize("name", ["DIST_VLM_IMAGE_FETCH_TIMEOUT", "VLLM_IMAGE_FETCH_TIMEOUT"])
def test_a_wrong_fetch_timeout_is_named_with_its_value(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} = '{value}': must be a number of seconds, above 0, finite$"):
        image_fetch_timeout_s({name: value})


@pytest.mark.parametrize(("cores", "workers"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 8), (17, 8), (200, 8)])
def test_everything_is_decided(cores: int, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_environment, "usable_cores", lambda: cores)
    environ = {"DIST_VLM_API_KEY": "k", "VLLM_IMAGE_FETCH_TIMEOUT": "3", "VLLM_PORT": "1", "VLLM_HOST_IP": "0.0.0.0"}
    assert resolved_server(ServerConfig(), ENGINE, environ) == ServerConfig(
        api_key="k", image_fetch_timeout_s=3.0, served_model_name="checkpoints/m", media_workers=workers
    )


def test_what_the_section_says_comes_first() -> None:
    given = ServerConfig(
        api_key="own", image_fetch_timeout_s=1.5, served_model_name="n", media_workers=3, chat_template="t.jinja"
    )
    environ = {"DIST_VLM_API_KEY": "k", "DIST_VLM_IMAGE_FETCH_TIMEOUT": "wrong"}
    assert resolved_server(given, ENGINE, environ) == given
    assert sources_of(given, environ) == {}


def test_the_variables_that_decide_are_told() -> None:
    environ = {"VLLM_API_KEY": "k", "VLLM_IMAGE_FETCH_TIMEOUT": "8", "DIST_VLM_IMAGE_FETCH_TIMEOUT": "1"}
    expected = {"api_key": "VLLM_API_KEY", "image_fetch_timeout_s": "DIST_VLM_IMAGE_FETCH_TIMEOUT"}
    assert sources_of(ServerConfig(), environ) == expected
    assert sources_of(ServerConfig(), {}) == {}
