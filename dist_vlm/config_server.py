"""The section `server` of a configuration: what the HTTP side does. The engine's sections are in `dist_vlm.config`."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from dist_vlm.config_fields import ConfigError, check_section, option

_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/\s]+")


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Left open are what the environment or the engine's configuration may say, and the number of media workers:
    `dist_vlm.config_environment.resolved_server` decides them. A `repr` is without the key."""

    host: str = option("str", "127.0.0.1", help="address to listen on (0.0.0.0: every network)")
    port: int = option("int", 8000, help="port to listen on (0: any free one, printed)", low=0, high=65535)
    api_key: str | None = option(
        "key", None, help="key that clients must send (none: DIST_VLM_API_KEY, else no key is asked for)"
    )
    served_model_name: str | None = option("str", None, help="the model's name for clients (none: the path of model)")
    chat_template: str | None = option(
        "template",
        None,
        help="file of a chat template, or the template itself (none: the checkpoint's, else the family's)",
    )
    response_role: str = option("str", "assistant", help="role of the answers")
    root_path: str = option("path_prefix", "", help="path under which a proxy shows this server")
    allowed_origins: tuple[str, ...] = option(
        "strings", (), help="origins of other sites whose pages may call this server, * for any"
    )
    allowed_methods: tuple[str, ...] = option("strings", ("*",), help="methods such pages may use")
    allowed_headers: tuple[str, ...] = option("strings", ("*",), help="headers such pages may send")
    allow_credentials: bool = option("bool", False, help="let such pages send the browser's credentials")
    ssl_keyfile: str | None = option("file", None, help="file of the TLS key")
    ssl_certfile: str | None = option("file", None, help="file of the TLS certificate")
    ssl_ca_certs: str | None = option("file", None, help="file of the authorities that clients' certificates come from")
    ssl_cert_reqs: int = option(
        "int", 0, help="clients' certificates (0: none, 1: optional, 2: required)", choices=(0, 1, 2)
    )
    uvicorn_log_level: str = option(
        "str",
        "info",
        help="what the HTTP library logs",
        choices=("debug", "info", "warning", "error", "critical", "trace"),
    )
    disable_access_log: bool = option("bool", False, help="log no line for each request")
    log_prompts: bool = option("bool", False, help="log the text of prompts too")
    max_log_len: int | None = option("int", None, help="characters of a prompt to log (none: all)", low=0)
    disable_page: bool = option("bool", False, help="serve no page at /")
    max_queued_requests: int = option(
        "int", 256, help="requests that may wait beside max_num_seqs in work; one more gets a 429", low=0
    )
    max_body_mib: float = option("float", 64.0, help="largest body of a request, in MiB", above=0)
    body_timeout_s: float = option("float", 30.0, help="seconds a client has to send a body", above=0)
    health_timeout_s: float = option(
        "float", 30.0, help="seconds in which every rank must have finished a step or answered a ping", above=0
    )
    drain_timeout_s: float = option(
        "float", 60.0, help="seconds that requests in work have to end after a SIGTERM", low=0
    )
    allowed_media_hosts: tuple[str, ...] | None = option(
        "strings", None, help="the only hosts that pictures are fetched from, *.example.org for a domain (none: any)"
    )
    allowed_media_networks: tuple[str, ...] = option(
        "strings", (), help="networks that are not public and may be fetched from all the same, as 10.0.0.0/8"
    )
    disable_media_fetch: bool = option("bool", False, help="fetch no pictures: only data: URLs are served")
    image_fetch_timeout_s: float | None = option(
        "float", None, help="seconds to fetch one picture (none: DIST_VLM_IMAGE_FETCH_TIMEOUT, else 5)", above=0
    )
    max_image_mib: float = option("float", 32.0, help="largest picture file, in MiB", above=0)
    media_memory_mib: int = option(
        "int", 1024, help="memory for pictures on their way to the engine; requests wait for their share", low=64
    )
    media_workers: int | None = option(
        "int", None, help="processes that decode pictures (none: one for two cores, at most 8)", low=1, high=64
    )
    media_worker_memory_mib: int = option(
        "int", 1024, help="memory that decoding may take in each of them, in MiB", low=64
    )

    def __post_init__(self) -> None:
        check_section(self, "server")
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            problem = "ssl_keyfile and ssl_certfile go together"
            raise ConfigError(problem, field="server.ssl_certfile", value=self.ssl_certfile)
        if self.ssl_cert_reqs and self.ssl_ca_certs is None:
            problem = "needs ssl_ca_certs, the authorities to check against"
            raise ConfigError(problem, field="server.ssl_cert_reqs", value=self.ssl_cert_reqs)
        if self.allow_credentials and "*" in self.allowed_origins:
            problem = "must name the origins where allow_credentials is set: any site could act for its visitors"
            raise ConfigError(problem, field="server.allowed_origins", value=self.allowed_origins)
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                problem = "must be * or an origin without a path, as https://www.example.org"
                raise ConfigError(problem, field="server.allowed_origins", value=origin)
        for network in self.allowed_media_networks:
            if not _is_network(network):
                problem = "must be a network, as 10.0.0.0/8, or one address"
                raise ConfigError(problem, field="server.allowed_media_networks", value=network)


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True
