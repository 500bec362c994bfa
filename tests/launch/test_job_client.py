"""The job API's answers in words, without a cluster; test_submit.py has one."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.job_submission import JobStatus

from dist_vlm.config_fields import ConfigError
from dist_vlm.launch.job_client import JobClient, exit_status, job_address


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ("http://a:1", {"RAY_API_SERVER_ADDRESS": "http://b:2"}, ("http://a:1", "--address")),
        (
            None,
            {"RAY_API_SERVER_ADDRESS": "http://b:2", "RAY_ADDRESS": "http://c:3"},
            ("http://b:2", "RAY_API_SERVER_ADDRESS"),
        ),
        (None, {"RAY_ADDRESS": "https://c:3"}, ("https://c:3", "RAY_ADDRESS")),
        (None, {"RAY_ADDRESS": "10.0.0.1:6379"}, ("http://127.0.0.1:8265", "the default; --address names another")),
    ],
)
def test_which_cluster_is_meant(given: str | None, environ: dict[str, str], expected: tuple[str, str]) -> None:
    assert job_address(given, environ) == expected


@pytest.mark.parametrize("text", ["auto", "10.0.0.1:8265", "ray://10.0.0.1:10001", "http://", "http://a:x"])
def test_an_address_that_is_no_url_is_refused_and_never_passed_over(text: str) -> None:
    with pytest.raises(ConfigError, match="--address = .*: must be http://HOST:PORT or https://HOST:PORT"):
        job_address(text, {})
    with pytest.raises(ConfigError, match="RAY_API_SERVER_ADDRESS: address = .*: must be http://HOST:PORT"):
        job_address(None, {"RAY_API_SERVER_ADDRESS": text})


class _Dashboard(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        status, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def dashboard(status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the paths that it was asked for."""
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Dashboard)
    server.paths = []
    server.answer = status, json.dumps({"version": "4", "ray_version": ray.__version__}).encode()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.paths
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize("name", ["RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"])
def test_the_address_that_is_given_is_the_one_that_is_asked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with dashboard() as (given, asked), dashboard() as (other, not_asked):
        monkeypatch.setenv(name, other)
        JobClient(given, "--address")
        assert asked
        assert not not_asked, "it would have got the token and the job"
        assert os.environ[name] == other


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"the Ray cluster at http://.* \(--address\) asks for a token, and none was sent"),
        (403, r"the Ray cluster at http://.* \(--address\) asks for a token, and the one that was sent is not"),
    ],
)
def test_what_a_cluster_says_of_the_token(status: int, message: str) -> None:
    with dashboard(status) as (address, _), pytest.raises(RuntimeError, match=message):
        JobClient(address, "--address")


def refusal(text: str, job_id: str | None = None) -> str:
    client = JobClient.__new__(JobClient)
    client._client, client._where = SimpleNamespace(submit_job=lambda **_: _raise(RuntimeError(text))), "somewhere"
    with pytest.raises(RuntimeError) as caught:
        client.submit("x", runtime_env={}, job_id=job_id)
    return str(caught.value)


def _raise(error: Exception) -> None:
    raise error


def test_what_a_cluster_refuses_is_told_without_its_traceback() -> None:
    trace = 'Request failed with status code 500: Traceback (most recent call last):\n  File "x.py", line 1\n'
    taken = trace + "ValueError: Job with submission_id j already exists. Please use a different submission_id.\n.\n."
    assert refusal(taken, "j") == "job j exists already at somewhere: --job-id must be a new name"
    assert refusal(trace + "KeyError: 'x'\n.") == "KeyError: 'x'"
    large = "Request failed with status code 413: Maximum request body size 104857600 exceeded.."
    assert refusal(large).startswith("--working-dir is larger than the cluster at somewhere takes;")
    assert "104857600" in refusal(large)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 3, 3),
        ("FAILED", 137, 137),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("FAILED", 0, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_status(status: str, code: int | None, expected: int) -> None:
    assert exit_status(SimpleNamespace(status=JobStatus(status), driver_exit_code=code)) == expected


class _Logs:
    """A job whose log breaks off after each of the given texts; every connection begins anew. The last one ends it."""

    def __init__(self, *texts: str) -> None:
        self._texts = list(texts)

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for part in self._texts.pop(0).split("|"):
            yield part
        if self._texts:
            raise RuntimeError("the connection was lost")

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(status=JobStatus.RUNNING if self._texts else JobStatus.SUCCEEDED)


def follow(*texts: str) -> str:
    client, written = JobClient.__new__(JobClient), list[str]()
    client._client, client._where = _Logs(*texts), "somewhere"
    client.follow("j", written.append)
    return "".join(written)


def test_a_log_that_breaks_off_is_taken_up_without_repeating_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_vlm.launch.job_client._PAUSE_S", 0.0)
    assert follow("one\n|two") == "one\ntwo"
    assert follow("one\n|tw", "one\ntwo\n", "o|ne\ntwo\nthr|ee\n") == "one\ntwo\nthree\n"


def test_one_that_breaks_off_again_and_again_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_vlm.launch.job_client._PAUSE_S", 0.0)
    with pytest.raises(RuntimeError, match="job j: its log breaks off again and again"):
        follow(*["one\n"] * 30)
