from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from dist_vlm import LLM
from dist_vlm.config import RULES, EngineConfig
from dist_vlm.config_load import flag_of
from dist_vlm.executor.base import ExecutorInfo
from dist_vlm.launch import bench, cli
from dist_vlm.launch.bench_floor import Floor
from dist_vlm.launch.bench_rates import DeviceRates
from dist_vlm.workers.config import LoadReport
from dist_vlm.workers.models import read_spec

INLINE = ["--executor", "inline", "--device", "cpu", "--kv-cache-memory-gib", "0.02", "--threads-per-rank", "1"]
TINY = {
    "throughput": ["--requests", "5", "--output-tokens", "3", "--warm-up", "2"],
    "latency": ["--rounds", "4", "--output-tokens", "3", "--warm-up", "1"],
    "steps": ["--batches", "1,3", "--prompt-tokens", "8", "--tokens", "6,9", "--rounds", "1"],
    "startup": ["--requests", "4", "--in-flight", "2", "--output-tokens", "3"],
}
TINY["all"] = [word.replace("--", f"--{name}-") for name in ("latency", "steps", "throughput") for word in TINY[name]]
FIGURES = {
    "throughput": {"requests_per_s", "output_tokens_per_s", "prompt_tokens_per_s", "seconds"},
    "latency": {
        f"{name}{size}" for name in ("first_token", "per_token") for size in ("", "_336x336", "_640x480", "_1024x768")
    },
    "steps": {"step_1", "step_3"},
    "startup": {"ready", "first_token", "longest_stall", "stall_p99"},
}


def measured(name: str, model: Path, folder: Path, *words: str) -> dict[str, Any]:
    """Runs a measurement of the real engine. Its JSON, of which the picture shows each figure."""
    out, plot = folder / "out.json", folder / "plot.svg"
    files = ["--out", str(out), "--plot", str(plot), "--commit", "abc"]
    assert cli.main(["bench", name, "--model", str(model), *INLINE, *TINY[name], *files, *words]) == 0
    return written(name, out, plot)


def written(name: str, out: Path, plot: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(out.read_text())
    assert (found["benchmark"], found["commit"], found["device_rates"]) == (name, "abc", None)
    assert found["config"]["executor"] == "inline"
    assert set(found["figures"]) == FIGURES[name]
    assert {one["floor"] for one in found["figures"].values()} == {None}
    bars = [one for one in ElementTree.parse(plot).iter() if one.get("height") == "16"]
    assert len(bars) == len(FIGURES[name])
    return found


def language_parameters(model: Path, fields: dict[str, Any]) -> float:
    """Those that the floors count, with the embedding table and the norms, which they leave out."""
    spec, report = read_spec(str(model)), LoadReport(0, 1, 1, 1, 1, 1, 1, {}, 1)
    rates = DeviceRates(1.0, 1.0, "float32")
    floor = Floor.of(EngineConfig.from_fields(**fields), spec, ExecutorInfo(1, (report,)), rates)
    left_out = spec.vocab_size * spec.hidden_size + (2 * spec.num_layers + 1) * spec.hidden_size
    return floor.layer_parameters + floor.head_parameters + left_out


def values(found: dict[str, Any]) -> dict[str, float]:
    return {name: one["value"] for name, one in found["figures"].items()}


def test_throughput_counts_what_the_engine_did(
    tiny_checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = measured("throughput", tiny_checkpoint, tmp_path)
    assert found["settings"] == {"requests": 5, "output_tokens": 3, "warm_up": 2}
    assert found["output_tokens"] == 15
    assert (found["preemptions"], found["cached_prompt_tokens"]) == (0, 0)
    # A picture is 16 tokens and its prompt has 48 words.
    assert found["prompt_tokens"] >= 5 * (16 + 48)
    rates = values(found)
    assert rates["requests_per_s"] * rates["seconds"] == pytest.approx(5, rel=1e-4)
    assert rates["output_tokens_per_s"] == pytest.approx(3 * rates["requests_per_s"], rel=1e-4)
    assert found["first_token"]["count"] == 5
    assert "req/s" in capfd.readouterr().out
    assert found["engine"]["kernels"].keys() >= {"paged_attention"}
    assert found["engine"]["language_parameters"] == [language_parameters(tiny_checkpoint, found["config"])]


def test_latency_is_told_by_size(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = measured("latency", tiny_checkpoint, tmp_path)
    counts = {size: one["first_token"]["count"] for size, one in found["by_size"].items()}
    assert counts == {"336x336": 2, "640x480": 1, "1024x768": 1}
    assert found["first_token"]["min_ms"] <= values(found)["first_token"] <= found["first_token"]["max_ms"]


def test_steps_are_told_by_batch_also_of_a_model_without_weights(tiny_facts: Path, tmp_path: Path) -> None:
    found = measured("steps", tiny_facts, tmp_path, "--load-format", "dummy")
    assert found["config"]["load_format"] == "dummy"
    assert found["mean_context_tokens"] == 8 + (6 + 7 + 8) / 3
    assert {batch: one["count"] for batch, one in found["by_batch"].items()} == {"1": 1, "3": 1}


def test_all_of_one_engine_write_what_each_writes_alone(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, start = [], LLM.from_config
    monkeypatch.setattr(LLM, "from_config", lambda config: engines.append(start(config)) or engines[-1])
    folder = tmp_path / "new"
    files = ["--out", str(folder), "--plot", str(folder), "--commit", "abc"]
    assert cli.main(["bench", "all", "--model", str(tiny_checkpoint), *INLINE, *TINY["all"], *files]) == 0
    (engine,) = engines
    with pytest.raises(RuntimeError, match="shut down"):
        engine.generate("a")
    names = ["latency", "steps", "throughput"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{n}.{e}" for n in names for e in ("json", "svg"))
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")]
    assert told == [f"{name}:" for name in names]
    for name in names:
        found = written(name, folder / f"{name}.json", folder / f"{name}.svg")
        alone = measured(name, tiny_checkpoint, tmp_path)
        assert found.keys() == alone.keys()
        assert found["settings"] == alone["settings"]
        assert found["engine"] == alone["engine"]
    # Pictures of the latencies are none of these, and so are the prompts.
    assert json.loads((folder / "throughput.json").read_text())["cached_prompt_tokens"] == 0


def test_of_all_some_are_left_out(tiny_facts: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny_facts), "--executor", "fake", "--device", "cpu", "--only", "throughput,latency"]
    assert cli.main(["bench", "all", *words, *TINY["all"], "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.json", "throughput.json"]


def test_a_start_is_that_of_a_process_of_its_own(tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = measured("startup", tiny_checkpoint, tmp_path)
    assert 0 < values(found)["ready"] < values(found)["first_token"] <= found["first_answer_s"]
    assert found["output_tokens"] == 12
    longest = [one["ms"] for one in found["longest_stalls"]]
    assert longest[0] == values(found)["longest_stall"]
    assert 0 < sum(longest) <= 1000 * found["seconds"] * 1.001


def test_on_a_gpu_figures_stand_beside_the_floors_of_the_rates(
    tiny_facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake executor stands in for the ranks: nothing here needs a GPU but the rates, which are given."""
    monkeypatch.setattr("dist_vlm.launch.bench_rates.measured_rates", lambda dtype: DeviceRates(1e9, 1e9, dtype))
    out = tmp_path / "out.json"
    words = ["--model", str(tiny_facts), "--executor", "fake", "--device", "cuda", "--max-num-seqs", "4"]
    assert cli.main(["bench", "throughput", *words, *TINY["throughput"], "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["device_rates"] == {"copy_gb_per_s": 1.0, "matmul_tflop_per_s": 0.0, "matmul_dtype": "float32"}
    one = found["figures"]["requests_per_s"]
    assert one["share_of_floor"] == pytest.approx(one["value"] / one["floor"], rel=1e-4)
    assert "% of it" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["throughput", "--requests", "0"], "argument --requests: '0': must be an integer, at least 1"),
        (["throughput", "--output-tokens", "9000"], "--output-tokens = 9000: must be at most 1984"),
        (["latency", "--output-tokens", "1"], "argument --output-tokens: '1': must be an integer, at least 2"),
        (["latency", "--rounds", "x"], "argument --rounds: 'x': must be an integer"),
        (["steps", "--batches", "1,0"], "argument --batches: '0': must be an integer, at least 1"),
        (["steps", "--batches", "1,300"], "--batches = 300: must be at most scheduler.max_num_seqs, which is 256"),
        (["steps", "--tokens", "9,9"], "argument --tokens: '9,9': must be two integers, the second above the first"),
        (["steps", "--tokens", "9,2040"], "--tokens = 2040: must be at most 2016"),
        (["steps", "--prompt-tokens", "49"], "--prompt-tokens = 49: must be at most 48"),
        (["startup", "--in-flight", "0"], "argument --in-flight: '0': must be an integer, at least 1"),
        (["steps", "--plot", "a.png"], "--plot = 'a.png': must end in .svg"),
        (["steps", "--out", "/absent/a.json"], "--out = '/absent/a.json': must be a file in an existing directory"),
        (["steps", "--batch", "1"], "unknown flag --batch; the nearest is --batches"),
        (["all", "--only", "steps,startup"], "argument --only: 'startup': must be of latency, steps, throughput"),
        (["all", "--steps-batches", "300"], "--steps-batches = 300: must be at most scheduler.max_num_seqs"),
        (["all", "--throughput-output-tokens", "9000"], "--throughput-output-tokens = 9000: must be at most 1984"),
        (["all", "--latency-rounds", "x"], "argument --latency-rounds: 'x': must be an integer"),
        (["all", "--out", "/absent/a"], "--out = '/absent/a': must be a directory, or a new one in another (No such"),
        (["step"], "invalid choice: 'step'"),
        ([], "the following arguments are required: MEASUREMENT"),
    ],
)
def test_a_wrong_word_is_one_line_before_anything_starts(
    tiny_facts: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    model = ["--model", str(tiny_facts), "--device", "cpu"] if words else []
    assert cli.main(["bench", *words, *model]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_cache_too_small_for_a_batch_is_refused_by_its_size(
    tiny_facts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_facts), "--executor", "fake", "--device", "cpu", "--num-gpu-blocks-override", "130"]
    assert cli.main(["bench", "steps", *words, "--batches", "16"]) == 2
    # 32 + 160 tokens are 12 blocks.
    needed = "batches = 16: needs 192 blocks of 16 tokens, and the KV cache has 130"
    assert f"--{needed}" in capsys.readouterr().err
    assert cli.main(["bench", "all", *words, "--only", "steps", "--steps-batches", "16"]) == 2
    assert f"--steps-{needed}" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(TINY))
def test_each_measurement_takes_every_field_as_a_flag_and_its_own(name: str) -> None:
    parser = cli.build_parser()
    for word in ("bench", name):
        commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = commands.choices[word]
    found = set(parser._option_string_actions)
    fields = {flag_of(field) for field in RULES}
    assert fields <= found
    own = {flag for flag in found if flag.startswith("--") and not flag.startswith("--no-")} - fields
    numbers = {word for word in TINY[name] if word.startswith("--")}
    only = {"--only"} if name == "all" else set()
    assert own == numbers | only | {"--help", "--config", "--out", "--plot", "--commit"}


def test_a_look_costs_no_heavy_import() -> None:
    code = """
import sys
from dist_vlm.launch import cli
try:
    cli.main(["bench", "steps", "--help"])
except SystemExit as end:
    print(end.code, [name for name in ("torch", "ray", "transformers", "numpy", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "0 []"


def test_every_measurement_is_there() -> None:
    assert set(bench.MEASUREMENTS) == set(TINY)
