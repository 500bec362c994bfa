"""The routes: what is there, what is not, and how either answers."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from dist_vlm.version import __version__

from .live import Live

PATHS = {
    "/health", "/ready", "/metrics", "/version", "/v1/models", "/v1/models/{name}", "/v1/chat/completions",
    "/v1/completions", "/tokenize", "/detokenize",
}  # fmt: skip


def test_the_document_lists_every_route_and_describes_every_body(live: Live) -> None:
    document: dict[str, Any] = httpx.get(f"{live.url}/openapi.json").json()
    assert set(document["paths"]) == PATHS
    for path, methods in document["paths"].items():
        if "post" in methods:
            ref = methods["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
            schema = document["components"]["schemas"][ref.rsplit("/", 1)[-1]]
            assert schema["additionalProperties"] is False, path
    fields = document["components"]["schemas"]["ChatFields"]
    assert {"messages", "max_completion_tokens", "logprobs", "top_logprobs", "tools"} <= set(fields["properties"])
    assert fields["required"] == ["messages"]


def test_models_and_version(live: Live) -> None:
    (card,) = httpx.get(f"{live.url}/v1/models").json()["data"]
    assert card["id"] == "tiny" and card["object"] == "model" and card["max_model_len"] == 512
    assert httpx.get(f"{live.url}/v1/models/tiny").json() == card
    missing = httpx.get(f"{live.url}/v1/models/other/name")
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert httpx.get(f"{live.url}/version").json() == {"version": __version__}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/health", 405), ("GET", "/docs", 404),
     ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/", 404), ("GET", "//health", 404)],
)  # fmt: skip
def test_what_is_not_served_is_told_in_openais_form(live: Live, method: str, path: str, status: int) -> None:
    answer = httpx.request(method, live.url + path)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


def test_health_readiness_and_metrics(live: Live) -> None:
    for path in ("/health", "/ready"):
        answer = httpx.get(live.url + path)
        assert answer.status_code == 200 and answer.json() == {"status": "ok"}
    text = httpx.get(f"{live.url}/metrics").text
    assert 'dist_vlm:num_requests_running{model_name="tiny"}' in text


def test_a_defect_is_told_without_its_text(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise KeyError("0x7f00dead")

    monkeypatch.setattr(live.services.llm.front.chat, "render_text", broken)
    body = {"messages": [{"role": "user", "content": "hello"}]}
    answer = httpx.post(f"{live.url}/v1/chat/completions", json=body)
    assert answer.status_code == 500
    assert "0x7f00dead" not in answer.text and "KeyError" in answer.json()["error"]["message"]
    monkeypatch.undo()
    assert httpx.post(f"{live.url}/v1/chat/completions", json=body | {"max_tokens": 1}).status_code == 200
