"""The command where there is nothing to restart; test_replica_client.py has a server."""

from __future__ import annotations

import pytest
from ray_head import free_port

from dist_vlm.launch import cli


def test_where_no_cluster_answers(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"127.0.0.1:{free_port()}"
    assert cli.main(["restart", "--ray-address", address]) == 1
    assert f"no Ray answers at {address}" in capsys.readouterr().err
