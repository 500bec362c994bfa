from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from dist_vlm.config import RULES, ConfigError
from dist_vlm.config_fields import rules_of
from dist_vlm.config_server import ServerConfig


def test_it_is_closed_to_the_world_by_default() -> None:
    server = ServerConfig()
    assert server.host == "127.0.0.1"
    assert server.allowed_origins == server.allowed_media_networks == ()
    assert not server.log_prompts


def test_no_field_has_the_name_of_one_of_the_engines() -> None:
    assert not set(rules_of(ServerConfig)) & set(RULES)


def test_the_key_is_in_no_text() -> None:
    server = ServerConfig(api_key="sk-abc")
    assert "sk-abc" not in repr(server)
    assert "host='127.0.0.1'" in repr(server)
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(server, api_key="sk abc")
    assert str(caught.value) == (
        "server.api_key: must be a string of visible ASCII characters, without spaces, or none"
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 65536}, "server.port = 65536: must be an integer, at least 0, at most 65_535"),
        ({"root_path": "/v/"}, "server.root_path = '/v/': must be empty, or a path such as /models/one"),
        ({"allowed_origins": "*"}, r"server.allowed_origins = '\*': must be a list of strings"),
        ({"allowed_origins": ("https://a.org/",)}, "server.allowed_origins = 'https://a.org/': must be . or an origin"),
        ({"allowed_origins": ("a.org",)}, "server.allowed_origins = 'a.org': must be . or an origin without a path"),
        (
            {"allowed_origins": ("*",), "allow_credentials": True},
            "must name the origins where allow_credentials is set",
        ),
        ({"ssl_keyfile": "k"}, "server.ssl_certfile = None: ssl_keyfile and ssl_certfile go together"),
        ({"ssl_certfile": "c"}, "server.ssl_certfile = 'c': ssl_keyfile and ssl_certfile go together"),
        ({"ssl_cert_reqs": 2}, "server.ssl_cert_reqs = 2: needs ssl_ca_certs"),
        ({"ssl_cert_reqs": 3}, "server.ssl_cert_reqs = 3: must be one of 0, 1, 2"),
        ({"allowed_media_networks": ("10.0.0.0/8", "ten")}, "server.allowed_media_networks = 'ten': must be a network"),
        ({"allowed_media_networks": ("10.0.0.1/8",)}, "allowed_media_networks = '10.0.0.1/8': must be a network"),
        ({"uvicorn_log_level": "loud"}, "server.uvicorn_log_level = 'loud': must be one of debug, info"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ServerConfig(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"allowed_origins": ("https://a.example:8443", "http://localhost:3000", "null"), "allow_credentials": True},
        {"allowed_origins": ["*"]},
        {"allowed_media_networks": ("10.0.0.0/8", "192.0.2.7", "fd00::/8")},
        {"ssl_keyfile": "k", "ssl_certfile": "c", "ssl_ca_certs": "a", "ssl_cert_reqs": 2},
    ],
)
def test_what_is_allowed_is_kept(values: dict[str, Any]) -> None:
    server = ServerConfig(**values)
    for name, value in values.items():
        kept = getattr(server, name)
        assert kept == (tuple(value) if isinstance(value, list) else value)
