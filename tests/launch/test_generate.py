from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dist_vlm.config import EngineConfig
from dist_vlm.launch import cli

WORDS = ["a", "red", "square"]


class ScriptedLLM:
    """Answers "a red square" and keeps what it was given."""

    made: list[ScriptedLLM] = []
    failure: Exception | None = None

    def __init__(self, config: EngineConfig) -> None:
        self.config, self.closed = config, False
        self.made.append(self)

    @classmethod
    def from_config(cls, config: EngineConfig) -> ScriptedLLM:
        return cls(config)

    def stream(self, inputs: Any, params: Any) -> Iterator[Any]:
        self.inputs, self.params = inputs, params
        for count in range(1, len(WORDS) + 1):
            answer = SimpleNamespace(text=" ".join(WORDS[:count]), token_ids=list(range(count)))
            yield SimpleNamespace(outputs=[answer])
            if self.failure is not None:
                raise self.failure

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(chat_template=None, convert_ids_to_tokens={32000: "<image>"}.get)

    def shutdown(self) -> None:
        self.closed = True


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> type[ScriptedLLM]:
    module = ModuleType("dist_vlm.llm")
    module.LLM = ScriptedLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dist_vlm.llm", module)
    monkeypatch.setattr(ScriptedLLM, "made", [])
    monkeypatch.setattr(ScriptedLLM, "failure", None)
    return ScriptedLLM


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a.png"
    Image.new("RGB", (8, 6), (255, 0, 0)).save(path)
    return str(path)


def test_pictures_and_prompt_go_in_and_the_answer_comes_out(
    llm: type[ScriptedLLM], picture: str, tiny_facts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_facts), "--prompt", "<image> what?", "--image", picture, "--max-tokens", "9"]
    assert cli.main(["generate", *words, "--top-k", "5", "--temperature", "0.5", "--seed", "7", "-tp", "2"]) == 0
    out, err = capsys.readouterr()
    assert out == "a red square\n"
    assert "generating" in err
    assert "3/9" in err
    (made,) = llm.made
    assert made.closed
    assert made.inputs["prompt"] == "<image> what?"
    assert [one.size for one in made.inputs["multi_modal_data"]["image"]] == [(8, 6)]
    assert (made.params.max_tokens, made.params.top_k, made.params.temperature, made.params.seed) == (9, 5, 0.5, 7)
    assert (made.config.parallel.tensor_parallel_size, made.config.model.seed) == (2, 7)
    assert made.config.model.max_model_len == 2048


def test_the_default_is_greedy_and_unseeded(
    llm: type[ScriptedLLM], tiny_facts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--model", str(tiny_facts), "--prompt", "x", "--no-progress"]) == 0
    assert capsys.readouterr() == ("a red square\n", "")
    made = llm.made[0]
    assert made.inputs == {"prompt": "x"}
    assert (made.params.temperature, made.params.seed, made.params.max_tokens) == (0.0, None, 128)


def test_several_pictures_keep_their_order(llm: type[ScriptedLLM], picture: str, tiny_facts: Path) -> None:
    other = str(Path(picture).with_name("b.png"))
    Image.new("RGB", (3, 4)).save(other)
    words = ["generate", "--model", str(tiny_facts), "--prompt", "<image><image>", "--image", other, "--image", picture]
    assert cli.main(words) == 0
    assert [one.size for one in llm.made[0].inputs["multi_modal_data"]["image"]] == [(3, 4), (8, 6)]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--image", "/absent.png"], 2, "--image = '/absent.png': must be an existing file"),
        (["--max-tokens", "0"], 2, "max_tokens"),
        (["--top-p", "1.5"], 2, "top_p"),
        (["--temperature", "-1"], 2, "temperature"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_starts(
    llm: type[ScriptedLLM],
    tiny_facts: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    message: str,
) -> None:
    assert cli.main(["generate", "--model", str(tiny_facts), "--prompt", "x", *words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert llm.made == []


def test_a_file_that_is_no_picture_is_one_line(
    llm: type[ScriptedLLM], tiny_facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_text("not a picture")
    words = ["--model", str(tiny_facts), "--prompt", "<image>", "--image", str(tmp_path / "a.png")]
    assert cli.main(["generate", *words]) == 1
    err = capsys.readouterr().err
    assert "a.png" in err
    assert "Traceback" not in err
    assert llm.made == []


def test_a_failure_of_the_run_ends_the_engine_and_is_one_line(
    llm: type[ScriptedLLM], tiny_facts: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm, "failure", ValueError("1 picture for 0 placeholders"))
    assert cli.main(["generate", "--model", str(tiny_facts), "--prompt", "x", "--no-progress"]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "dist-vlm: error: 1 picture for 0 placeholders\n")
    assert llm.made[0].closed


def test_pictures_without_a_place_or_a_template_are_refused(
    llm: type[ScriptedLLM], picture: str, tiny_facts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tiny_facts), "--prompt", "what?", "--image", picture, "--no-progress"]
    assert cli.main(["generate", *words]) == 1
    assert "no chat template: mark the place of each picture in --prompt with <image>" in capsys.readouterr().err
    assert llm.made[0].closed


@pytest.mark.parametrize("typed", ["USER: <image>\nwhat is this? ASSISTANT:", "what is this?"])
def test_the_real_engine_gives_the_answer_of_the_reference(
    typed: str, tiny_checkpoint: Path, picture: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With the prompt as it stands, and with a question that the chat template turns into the same prompt."""
    words = ["--model", str(tiny_checkpoint), "--executor", "inline", "--device", "cpu"]
    words += ["--kv-cache-memory-gib", "0.01", "--threads-per-rank", "1"]
    words += ["--image", picture, "--prompt", typed, "--max-tokens", "6"]
    assert cli.main(["generate", *words]) == 0
    out, err = capfd.readouterr()
    prompt = "USER: <image>\nwhat is this? ASSISTANT:"
    assert out == _reference_answer(tiny_checkpoint, picture, prompt, max_tokens=6) + "\n"
    assert "done" in err


def _reference_answer(model: Path, picture: str, prompt: str, *, max_tokens: int) -> str:
    """transformers' own greedy answer, in float32."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(model, backend="pil")
    reference = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32).eval()
    inputs = processor(images=[Image.open(picture)], text=[prompt], return_tensors="pt")
    tokens = reference.generate(**inputs, max_new_tokens=max_tokens, do_sample=False)
    return str(processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
