from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_vlm.config import EngineConfig
from dist_vlm.config_load import LoadedConfig
from dist_vlm.config_server import ServerConfig
from dist_vlm.entrypoints.openai import api_server

# The page's command, the model and the template's place but for.
COMMAND = """
    --model {model} \
    --image-input-type pixel_values \
    --image-token-id 32000 \
    --image-input-shape 1,3,336,336 \
    --image-feature-size 576 \
    --chat-template {template}
"""


def test_the_command_of_the_page_starts_its_server(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[LoadedConfig] = []
    monkeypatch.setattr(api_server, "start_server", lambda loaded: started.append(loaded) or 5)
    assert (
        api_server.main(COMMAND.format(model="llava-hf/llava-1.5-7b-hf", template="template_llava.jinja").split()) == 5
    )
    (loaded,) = started
    assert loaded.config == EngineConfig.from_fields(
        model="llava-hf/llava-1.5-7b-hf", image_input_type="pixel_values", image_token_id=32000,
        image_input_shape="1,3,336,336", image_feature_size=576,
    )  # fmt: skip
    assert loaded.server == ServerConfig(chat_template="template_llava.jinja")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--modle x", "unknown flag --modle; the nearest is --model"),
        ("--image-input-type image_features --image-feature-size 16 --image-token-id 32000 "
         "--image-input-shape 1,3,56,56 --model {model}", "--image-input-type = 'image_features': a server takes"),
        ("--image-input-type pixel_values --model {model}", "Specify image_token_id, image_input_shape, image_feature"),
        ("--image-token-id 5 --model {model}", "--image-token-id = 5: must be 32000, the checkpoint's, or none"),
        ("--model {model} --chat-template absent.jinja", "--chat-template = 'absent.jinja': no such file"),
        ("--model {model} --quantization awq", "--quantization = 'awq': is not served (leave it out): quantized"),
        ("--port 80", "model.model is missing: a checkpoint directory is needed (or --model DIR)"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line_and_status_2(
    words: str, message: str, tiny_facts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert api_server.main(words.format(model=tiny_facts).split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("dist-vlm: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_it_runs_as_a_module() -> None:
    command: list[Any] = [sys.executable, "-m", "dist_vlm.entrypoints.openai.api_server", "--api-kee", "k"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "dist-vlm: error: unknown flag --api-kee; the nearest is --api-key\n"
