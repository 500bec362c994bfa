from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dist_vlm.config import RULES
from dist_vlm.config_load import SERVER_RULES, flag_of
from dist_vlm.launch import cli, info
from dist_vlm.version import __version__

HEAVY = ("torch", "ray", "transformers", "numpy", "PIL", "fastapi", "uvicorn", "aiohttp")


def error_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    status = cli.main(words)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dist-vlm: error: ")
    assert err.count("\n") == 1
    return status, err.removeprefix("dist-vlm: error: ").rstrip("\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["generat"], "invalid choice: 'generat'"),
        (["config"], "the following arguments are required: VERB"),
        (["config", "show"], "the following arguments are required: FILE"),
        (["config", "show", "a.yaml", "b.yaml"], "unknown argument b.yaml"),
        (
            ["config", "show", "a.yaml", "--max-num-seq", "3"],
            "unknown flag --max-num-seq; the nearest is --max-num-seqs",
        ),
        (["config", "show", "a.yaml", "--max-num-seqs"], "argument --max-num-seqs: expected one argument"),
        (["generate", "--promt=x"], "unknown flag --promt; the nearest is --prompt"),
        (["generate"], "one of the arguments --prompt --input is required"),
        (["generate", "--prompt", "x", "--input", "y"], "argument --input: not allowed with argument --prompt"),
        (["check"], "model.model is missing"),
        (["serve"], "model.model is missing"),
        (["serve", "--prot", "1"], "unknown flag --prot; the nearest is --port"),
        (["serve", "--model", "m", "--port", "70000"], "--port = '70000': must be an integer, at least 0, at most 65"),
        (["generate", "--prompt", "x", "--model", "m", "--port", "1"], "unknown flag --port"),
        (["generate", "--prompt", "x", "--max-tokens", "ten"], "argument --max-tokens: 'ten': must be an integer"),
        (["generate", "--prompt", "x", "--top-p", "nan"], "argument --top-p: 'nan': must be a finite number"),
        (["generate", "--prompt", "x"], "model.model is missing"),
        (["config", "show", "/absent.yaml"], "/absent.yaml: cannot be read: No such file or directory"),
        (["generate", "--prompt", "x", "--model", "/absent/m"], "--model = '/absent/m': "),
    ],
)
def test_a_wrong_command_line_is_one_line_and_status_2(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    status, text = error_of(capsys, *words)
    assert status == 2
    assert message in text


@pytest.mark.parametrize("error", [RuntimeError("load failed\n (rank 1): no"), ValueError("load failed (rank 1): no")])
def test_a_failed_run_is_one_line_and_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(info, "run", _raiser(error))
    assert error_of(capsys, "info") == (1, "load failed (rank 1): no")


def test_an_interrupt_is_said_and_is_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(info, "run", _raiser(KeyboardInterrupt()))
    assert error_of(capsys, "info") == (130, "interrupted")


def test_a_fault_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "run", _raiser(KeyError("a bug")))
    with pytest.raises(KeyError, match="a bug"):
        cli.main(["info"])


def _raiser(error: BaseException) -> object:
    def run(arguments: argparse.Namespace) -> None:
        raise error

    return run


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"dist-vlm {__version__}\n"


GENERATE = (
    "prompt image input output resume media-root max-tokens temperature top-p top-k "
    "allowed-media-hosts allowed-media-networks image-fetch-timeout-s max-image-mib"
)
CHECK = "ranks probes tolerance json reference-device"


SERVE = " ".join(name.replace("_", "-") for name in SERVER_RULES)


@pytest.mark.parametrize(("command", "flags"), [("generate", GENERATE), ("check", CHECK), ("serve", SERVE)])
def test_a_run_takes_every_field_as_a_flag_and_its_own(command: str, flags: str) -> None:
    parser = cli.build_parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    found = set(commands.choices[command]._option_string_actions)
    fields = {flag_of(name) for name in RULES}
    assert fields <= found
    own = {flag for flag in found if flag.startswith("--") and not flag.startswith("--no-")} - fields
    assert own == {"--help", "--config", *(f"--{flag}" for flag in flags.split())}


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["generate", "--help"],
        ["check", "--help"],
        ["serve", "--help"],
        ["config", "show", "FILE"],
        ["--version"],
    ],
)
def test_a_look_costs_no_heavy_import(words: list[str], tiny_facts: Path, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(f"model: {{model: {tiny_facts}}}")
    words = [str(file) if word == "FILE" else word for word in words]
    code = f"""
import json, sys
from dist_vlm.launch import cli
try:
    status = cli.main({words!r})
except SystemExit as end:
    status = end.code
print(json.dumps([status, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, []]
    assert len(done.stdout.splitlines()) > 1


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).parent / "dist-vlm"
    done = subprocess.run([command, "config", "show", "/absent.yaml"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == "dist-vlm: error: /absent.yaml: cannot be read: No such file or directory\n"
    assert done.stdout == ""


def test_a_reader_that_leaves_is_no_traceback(tiny_facts: Path, tmp_path: Path) -> None:
    file = tmp_path / "launch.yaml"
    file.write_text(f"model: {{model: {tiny_facts}}}")
    command = f"{sys.executable} -u -m dist_vlm.launch.cli config show {file} | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
