"""The shipped dashboard asks for series that a server has, and for no others."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

from .live import Live

BOARD = Path(__file__).resolve().parents[2] / "examples" / "grafana" / "dist-vlm.json"


def test_every_series_of_the_dashboard_is_served(live: Live) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "ignore_eos": True}
    assert httpx.post(f"{live.url}/v1/chat/completions", json=body).status_code == 200
    text = httpx.get(f"{live.url}/metrics").text
    declared = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    panels = json.loads(BOARD.read_text(encoding="utf-8"))["panels"]
    names = {name for panel in panels for one in panel["targets"] for name in re.findall(r"dist_vlm:\w+", one["expr"])}
    assert len(names) > 20
    for name in names:
        base = name.removesuffix("_bucket")
        assert declared.get(base) == "histogram" if name.endswith("_bucket") else name in declared, name
    ids = [panel["id"] for panel in panels]
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}
    assert len(set(ids)) == len(panels) == len(places)
