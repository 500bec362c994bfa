"""The job API's answers in words, without a cluster; test_submit.py has one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.job_submission import JobStatus

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
