"""Requests made from the server's own document: whatever it allows or forbids, the server answers as it says."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

from .live import Live

# What a response is checked for, beside being no server error: 503 is one too. Not that every body which the document
# allows is served: ranges, and what goes with what, are told by the messages alone.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method", "allow_header_conformance",
)  # fmt: skip
NUM_EXAMPLES = 40


def answered(live: Live) -> Counter[tuple[str, str]]:
    """How often each path of the document has answered with each status, as the server itself counts."""
    (family,) = live.services.metrics.responses.collect()
    return Counter({
        (sample.labels["path"], sample.labels["status"]): int(sample.value)
        for sample in family.samples if sample.name.endswith("_total")
    })  # fmt: skip


@pytest.mark.timeout(100)
def test_no_request_that_the_document_leads_to_makes_the_server_fail(live: Live, tmp_path: Path) -> None:
    before = answered(live)
    command = [
        Path(sys.executable).with_name("schemathesis"), "run", f"{live.url}/openapi.json", "--checks", ",".join(CHECKS),
        "--phases", "coverage,fuzzing", "--max-examples", str(NUM_EXAMPLES), "--generation-deterministic",
        "--no-color", "--warnings", "off",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    new = answered(live) - before
    assert "10 selected / 10 total" in done.stdout
    document = httpx.get(f"{live.url}/openapi.json").json()
    assert sum(map(len, document["paths"].values())) == 10
    for path, methods in document["paths"].items():
        statuses = Counter({status: number for (place, status), number in new.items() if place == path})
        assert not any(status.startswith("5") for status in statuses), path
        # Models are counted by no name of their own.
        assert statuses["200"] >= 1 or "{" in path, f"nothing at {path} was ever served"
        assert "post" not in methods or statuses["400"] >= NUM_EXAMPLES / 2, path
