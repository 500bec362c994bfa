"""Ray's job API, with its failures in words: where the cluster is, what it refuses, what became of a job."""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import requests

from dist_vlm.config_fields import ConfigError
from dist_vlm.workers.failure import describe

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_PAUSE_S = 0.5
_READY_S = 30.0
_NOT_READY = "No available agent"
_TOO_LARGE = ("status code 413", "exceeds the maximum size")
# A log that breaks off so often in a row without a new word is given up.
_MAX_BREAKS = 10
# A connection that lasted so long had only nothing to tell.
_LASTED_S = 5.0
# For a job that was stopped; one that was killed has 128 and the signal's number, as a shell tells it.
STOPPED = 130


def job_address(given: str | None, environ: Mapping[str, str]) -> tuple[str, str]:
    """The address of the cluster's job API, and where it is from. Raises `ConfigError` for one that is no URL.

    RAY_ADDRESS may be that of the cluster's own protocol, which has no jobs.
    """
    if given is not None:
        return _url(given, "--address"), "--address"
    name = "RAY_API_SERVER_ADDRESS"
    if environ.get(name):
        return _url(environ[name], name), name
    if environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        return _url(environ["RAY_ADDRESS"], "RAY_ADDRESS"), "RAY_ADDRESS"
    return DEFAULT_ADDRESS, "the default; --address names another"


def _url(text: str, source: str) -> str:
    try:
        parts = urlsplit(text)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_url = False
    if not is_url:
        raise ConfigError("must be http://HOST:PORT or https://HOST:PORT", field="address", value=text, source=source)
    return text


class JobClient:
    """Raises `RuntimeError` naming the address where no cluster answers, or where it refuses; so do all methods.

    address, source: from `job_address`. The token is Ray's affair: RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or
        RAY_AUTH_TOKEN_PATH.
    """

    def __init__(self, address: str, source: str) -> None:
        self._where = f"{address} ({source})"
        try:
            submission = importlib.import_module("ray.job_submission")
        except ImportError:
            raise RuntimeError("Ray's job API is missing: pip install 'dist-vlm[cluster]'") from None
        with self._in_words(), _without_addresses():
            self._client = submission.JobSubmissionClient(address)

    def submit(self, entrypoint: str, *, runtime_env: dict[str, Any], job_id: str | None) -> str:
        """Returns the job's id. job_id: None takes one from Ray; one that exists is refused."""
        end = time.monotonic() + _READY_S
        while True:
            try:
                with self._in_words():
                    submitted: str = self._client.submit_job(
                        entrypoint=entrypoint, runtime_env=runtime_env, submission_id=job_id
                    )
                return submitted
            except RuntimeError as error:
                # The dashboard of a cluster that has just started answers before its agents do.
                if _NOT_READY not in str(error) or time.monotonic() > end:
                    raise self._refusal(error, job_id) from error
            time.sleep(_PAUSE_S)

    def _refusal(self, error: RuntimeError, job_id: str | None) -> RuntimeError:
        text = str(error)
        if job_id is not None and f"{job_id} already exists" in text:
            return RuntimeError(f"job {job_id} exists already at {self._where}: --job-id must be a new name")
        if any(words in text for words in _TOO_LARGE):
            return RuntimeError(
                f"--working-dir is larger than the cluster at {self._where} takes; what .rayignore names in it stays"
                f" here, and large files belong on storage that the cluster sees ({_last_line(text)})"
            )
        return RuntimeError(_last_line(text)) if "Traceback" in text else error

    def details(self, job_id: str) -> Any:
        with self._in_words():
            return self._client.get_job_info(job_id)

    def stop(self, job_id: str) -> None:
        with self._in_words():
            self._client.stop_job(job_id)

    def follow(self, job_id: str, write: Callable[[str], None]) -> Any:
        """Passes the job's log on as it grows, until the job has ended; returns its details."""
        return asyncio.run(self._follow(job_id, write))

    async def _follow(self, job_id: str, write: Callable[[str], None]) -> Any:
        num_written = num_breaks = 0
        while True:
            num_seen, began = 0, time.monotonic()
            cause: Exception | None = None
            try:
                # A new connection begins with the log's beginning: what is written already is passed over.
                async for text in self._client.tail_job_logs(job_id):
                    new = text[max(0, num_written - num_seen) :]
                    num_seen += len(text)
                    if new:
                        write(new)
                        num_written, num_breaks = max(num_written, num_seen), 0
            except Exception as error:
                cause = error
            try:
                details = await asyncio.to_thread(self.details, job_id)
                if details.status.is_terminal():
                    return details
            except RuntimeError as error:
                cause = error
            num_breaks = 1 if time.monotonic() - began > _LASTED_S else num_breaks + 1
            if num_breaks >= _MAX_BREAKS:
                last = "without a cause" if cause is None else describe(cause)
                raise RuntimeError(f"job {job_id}: its log breaks off again and again: {last}")
            await asyncio.sleep(_PAUSE_S)

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise RuntimeError(_refused(self._where, error.message)) from error
        except (requests.exceptions.RequestException, ConnectionError) as error:
            text = f"no Ray cluster with a dashboard answers at {self._where} ({type(error).__name__})"
            raise RuntimeError(text) from error


def exit_status(details: Any) -> int:
    """The entrypoint's own, where the job has one."""
    if details.status == "SUCCEEDED":
        return 0
    if details.status == "STOPPED":
        return STOPPED
    code = details.driver_exit_code
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1


@contextmanager
def _without_addresses() -> Iterator[None]:
    """Ray would take these before the address that it is given."""
    names = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _refused(where: str, message: str) -> str:
    """message: Ray's, which begins with what the cluster said, if it was the cluster that said it."""
    to_do = "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's"
    if message.startswith("Authentication required"):
        return f"the Ray cluster at {where} asks for a token, and none was sent: {to_do}"
    if message.startswith("Authentication failed"):
        return f"the Ray cluster at {where} asks for a token, and the one that was sent is not the cluster's: {to_do}"
    return f"RAY_AUTH_MODE is token, and there is none to send to {where}: {to_do}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.replace("\\n", "\n").splitlines()]
    return next((line for line in reversed(lines) if line.strip(". ")), text)[:500]
