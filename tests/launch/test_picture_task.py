from __future__ import annotations

import dataclasses
import itertools
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.config_server import ServerConfig
from dist_vlm.launch.jsonl import Line
from dist_vlm.launch.jsonl_request import RequestReader
from dist_vlm.launch.line_table import PreparedLine
from dist_vlm.launch.picture_setup import PictureSetup
from dist_vlm.launch.picture_task import LINES_AHEAD, prepared_in_order, table_of
from dist_vlm.sampling import SamplingParams

SERVER = ServerConfig(allowed_media_networks=("127.0.0.0/8",), image_fetch_timeout_s=1.0)


@pytest.fixture
def setup(tiny_facts: Path, tmp_path: Path) -> PictureSetup:
    Image.new("RGB", (8, 6), (255, 0, 0)).save(tmp_path / "red.png")
    config = resolve(EngineConfig.from_fields(model=str(tiny_facts), device="cpu"))
    return PictureSetup(config, SERVER, str(tmp_path))


def lines_of(*values: dict[str, object]) -> list[Line]:
    return [Line(index, f"n{index}", dict(one)) for index, one in enumerate(values, 1)]


def reader_of(setup: PictureSetup) -> RequestReader:
    return RequestReader(vision=setup.config.vision, defaults=SamplingParams(), seed=0)


def test_lines_come_in_their_order_and_wrong_ones_with_their_error(setup: PictureSetup) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        lines = lines_of(
            {"prompt": "a", "images": [f"http://127.0.0.1:{silent.getsockname()[1]}/a.png"]},
            {"prompt": "a", "images": ["red.png"]},
            {"prompt": "a", "promt": "b"},
            {"prompt": "a"},
            {"prompt": "a", "images": ["red.png", "absent.png"]},
        )
        told = list(prepared_in_order(lines, reader=reader_of(setup), setup=setup))
    by_index = {one.line.index: one for one in told}
    assert [one.line.index for one in told] == [1, 2, 3, 4, 5]
    assert [len(by_index[index].images) for index in (2, 4)] == [1, 0]
    assert {index: one.error is None for index, one in by_index.items()} == {
        1: False, 2: True, 3: False, 4: True, 5: False
    }  # fmt: skip
    assert "(timeout)" in str(by_index[1].error)
    assert "unknown key 'promt'" in str(by_index[3].error)


def test_the_time_of_a_fetch_runs_on_while_nobody_takes_results(setup: PictureSetup) -> None:
    """A fetch is not broken off because the one before it was not taken."""
    from ..server.picture_hosts import picture_host

    with picture_host() as host:
        url = f"http://127.0.0.1:{host.port}/picture.png"
        lines = lines_of({"prompt": "a"}, *({"prompt": "a", "images": [url]} for _ in range(2)))
        results = prepared_in_order(lines, reader=reader_of(setup), setup=setup)
        first = list(itertools.islice(results, 1))
        time.sleep(1.5)
        rest = list(results)
    assert [one.error for one in first][0] is None
    assert len(rest) == 2
    assert [one.error for one in rest] == [None, None]


def test_lines_are_prepared_so_far_ahead_and_given_up_with_the_results(setup: PictureSetup) -> None:
    taken: list[int] = []

    def lines() -> Iterator[Line]:
        for index in range(1, 100):
            taken.append(index)
            yield Line(index, index, {"prompt": "a", "images": ["red.png"]})

    results = prepared_in_order(lines(), reader=reader_of(setup), setup=setup, most_ahead=4)
    assert [next(results).line.index for _ in range(3)] == [1, 2, 3]
    assert taken == list(range(1, 7))
    results.close()
    assert [thread for thread in threading.enumerate() if thread.name == "prepare-part"] == []
    assert LINES_AHEAD >= 4


def test_a_line_too_deep_to_be_passed_on_is_wrong() -> None:
    value: list[object] = []
    for _ in range(5000):
        value = [value]
    table = table_of(PreparedLine(Line(1, "deep", {"prompt": value})))
    assert table["error"].to_pylist() == ["the line is nested too deeply"]


def test_no_key_goes_to_other_machines(setup: PictureSetup) -> None:
    server = dataclasses.replace(SERVER, api_key="a-secret", max_image_mib=3.0, disable_media_fetch=True)
    sent = pickle.dumps(PictureSetup(setup.config, server, setup.media_root))
    assert b"a-secret" not in sent
    kept = pickle.loads(sent).server
    assert (kept.max_image_mib, kept.disable_media_fetch) == (3.0, True)
    assert (kept.allowed_media_networks, kept.image_fetch_timeout_s) == (("127.0.0.0/8",), 1.0)
