from __future__ import annotations

import functools
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dist_vlm.config import EngineConfig
from dist_vlm.engine.front import load_tokenizer
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.launch import cli
from dist_vlm.launch.jsonl import parse_line
from dist_vlm.launch.line_source import LineParts, LineSource
from dist_vlm.launch.line_table import AnsweredLine
from dist_vlm.workers.models import get_family

from ..server.picture_hosts import OTHER, picture_host

WORDS = ["a", "red", "square"]
loaded_once = functools.cache(load_tokenizer)


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
        return loaded_once(str(self.config.model.tokenizer))

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
        (["--output", "x"], 2, "--output goes with --input, and there is none"),
        (["--resume"], 2, "--resume goes with --input, and there is none"),
        (["--media-root", "."], 2, "--media-root goes with --input, and there is none"),
        (["--max-image-mib", "3"], 2, "--max-image-mib goes with --input, and there is none"),
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
    llm: type[ScriptedLLM],
    picture: str,
    tiny_facts: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loaded_once(str(tiny_facts)), "chat_template", None)
    monkeypatch.setattr("dist_vlm.engine.front.stored_template", lambda folders: None)
    monkeypatch.setattr(type(get_family("llava")), "chat_template", None)
    words = ["--model", str(tiny_facts), "--prompt", "what?", "--image", picture, "--no-progress"]
    assert cli.main(["generate", *words]) == 1
    assert "no chat template: mark the place of each picture in the prompt with <image>" in capsys.readouterr().err
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


# ---- a file of requests ----


DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "checkpoint"


class FileRun:
    """An input beside a picture, and the command on it."""

    def __init__(self, folder: Path, *lines: Any) -> None:
        self.input, self.output = folder / "in.jsonl", folder / "out.jsonl"
        self.input.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))

    def words(self, model: Path, *more: str) -> list[str]:
        return ["generate", "--model", str(model), "--input", str(self.input), "--output", str(self.output), *more]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.read_text(encoding="utf-8").splitlines()]

    def by_index(self) -> dict[int, dict[str, Any]]:
        """Each line's record; fails where a line has two."""
        records = {record["index"]: record for record in self.records()}
        assert len(records) == len(self.records())
        return records


FAKE = ["--executor", "fake", "--device", "cpu", "--max-model-len", "128", "--no-progress", "--max-num-seqs", "4"]
INLINE = ["--executor", "inline", "--device", "cpu", "--kv-cache-memory-gib", "0.01", "--threads-per-rank", "1"]


def test_lines_of_every_form_get_the_answers_of_the_reference(
    tiny_checkpoint: Path, picture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    question = {"type": "text", "text": "what is this?"}
    run = FileRun(
        tmp_path,
        {"prompt": "what is this?", "images": ["a.png"], "id": "turn"},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": picture}}, question]}]},
        {"prompt": "USER: <image>\nwhat is this? ASSISTANT:", "images": [picture], "max_tokens": 3},
        {"prompt": "USER: hello ASSISTANT:", "logprobs": 1},
        {"prompt": "USER: hello ASSISTANT:", "temperature": 1, "n": 2, "seed": 5},
        {"prompt": "hello", "images": ["../a.png"]},
        '{"prompt": ',
    )
    assert cli.main(run.words(tiny_checkpoint, *INLINE, "--max-tokens", "6")) == 0
    out, err = capfd.readouterr()
    assert out == ""
    assert "dist-vlm: 7 lines answered, 2 of them with an error" in err
    answers = run.by_index()
    expected = _reference_answer(tiny_checkpoint, picture, "USER: <image>\nwhat is this? ASSISTANT:", max_tokens=6)
    assert answers[1]["id"] == "turn"
    assert answers[2]["id"] == 2
    assert answers[1]["text"] == answers[2]["text"] == expected
    assert answers[3]["token_ids"] == answers[1]["token_ids"][:3]
    assert answers[3]["finish_reason"] == "length"
    assert answers[3]["usage"]["completion_tokens"] == 3
    assert len(answers[4]["logprobs"]) == 6
    assert all(str(token) in told for token, told in zip(answers[4]["token_ids"], answers[4]["logprobs"], strict=True))
    assert [one["index"] if "index" in one else len(one["token_ids"]) for one in answers[5]["outputs"]] == [6, 6]
    assert answers[5]["outputs"][0]["token_ids"] != answers[5]["outputs"][1]["token_ids"]
    assert "leads out of" in answers[6]["error"]
    assert answers[7] == {"id": 7, "index": 7, "error": "the line is not JSON: Expecting value, column 11"}


def test_wrong_lines_fail_alone(tiny_facts: Path, tmp_path: Path, picture: str) -> None:
    (tmp_path / "text.png").write_text("not a picture")
    wrong = {
        2: {"prompt": "a", "promt": "b"},
        3: {"prompt": "a", "images": ["text.png"], "id": "bad"},
        5: {"prompt": "a", "images": ["absent.png"]},
        6: {"prompt": "a", "top_p": 2},
        7: {"prompt": ""},
        8: {"prompt": "a" * 2000},
        9: {"prompt": "<image> <image>", "images": ["a.png"]},
        10: {"messages": [{"role": "wizard", "content": "a"}]},
        11: {"prompt": "a", "prompt_logprobs": 10**6},
    }
    lines = [wrong.get(index, {"prompt": f"line {index}"}) for index in range(1, 14)]
    run = FileRun(tmp_path, *lines)
    assert cli.main(run.words(tiny_facts, *FAKE, "--max-tokens", "4")) == 0
    answers = run.by_index()
    assert sorted(answers) == list(range(1, 14))
    assert {index for index in answers if "error" in answers[index]} == set(wrong)
    assert answers[3]["id"] == "bad"
    quiet = FileRun(tmp_path, *(line for index, line in enumerate(lines, 1) if index not in wrong))
    quiet.output = tmp_path / "quiet.jsonl"
    assert cli.main(quiet.words(tiny_facts, *FAKE, "--max-tokens", "4")) == 0
    told = [answers[index]["token_ids"] for index in sorted(answers) if index not in wrong]
    assert told == [quiet.by_index()[index]["token_ids"] for index in sorted(quiet.by_index())]


def test_ids_may_repeat_and_the_order_is_that_of_the_ends(
    tiny_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = FakeExecutor.__init__
    monkeypatch.setattr(FakeExecutor, "__init__", functools.partialmethod(sound, step_delay_s=0.005))
    run = FileRun(tmp_path, *({"prompt": "x", "id": "same", "max_tokens": 61 - 20 * index} for index in range(4)))
    assert cli.main(run.words(tiny_facts, *FAKE)) == 0
    assert [(record["index"], record["id"]) for record in run.records()] == [
        (4, "same"), (3, "same"), (2, "same"), (1, "same")
    ]  # fmt: skip


def test_pictures_may_lie_in_a_directory_that_is_named(tiny_facts: Path, tmp_path: Path, picture: str) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    run = FileRun(folder, {"prompt": "<image>", "images": ["a.png"]}, {"prompt": "<image>", "images": ["elsewhere"]})
    assert cli.main(run.words(tiny_facts, *FAKE, "--media-root", str(tmp_path))) == 0
    answers = run.by_index()
    assert answers[1]["usage"]["prompt_tokens"] >= 16
    assert "there is no such file" in answers[2]["error"]


def test_pictures_by_url_are_answered_as_those_in_files(
    tiny_checkpoint: Path, picture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a prompt and in messages, beside a dead host, a silent one, and an address that is not public."""
    with picture_host() as host, socket.create_server((OTHER, 0)) as silent:
        content = urllib.request.urlopen(f"http://{OTHER}:{host.port}/picture.png").read()
        (tmp_path / "same.png").write_bytes(content)
        url, question = f"http://{OTHER}:{host.port}/picture.png", {"type": "text", "text": "what is this?"}
        dead, mute = f"http://{OTHER}:1/a.png", f"http://{OTHER}:{silent.getsockname()[1]}/a.png"
        run = FileRun(
            tmp_path,
            {"prompt": "what is this?", "images": [mute]},
            {"prompt": "what is this?", "images": [dead]},
            {"prompt": "what is this?", "images": ["same.png"]},
            {"prompt": "what is this?", "images": [url], "id": "by url"},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, question]}]},
            {"prompt": "what is this?", "images": [url, "same.png"]},
            {"prompt": "what is this?", "images": [f"http://{OTHER}:{host.port}/absent.png"]},
            {"prompt": "what is this?", "images": [f"http://{OTHER}:{host.port}/page.png"]},
            {"prompt": "what is this?", "images": [f"http://[::1]:{host.port}/picture.png"]},
        )
        words = run.words(tiny_checkpoint, *INLINE, "--max-tokens", "4", "--no-progress")
        flags = ["--allowed-media-networks", "127.0.0.0/8", "--image-fetch-timeout-s", "1.5"]
        assert cli.main([*words, *flags]) == 0
        answers = run.by_index()
        # The silent host's line ends last, and keeps no other waiting.
        assert run.records()[-1]["index"] == 1
        run.output = tmp_path / "closed.jsonl"
        assert cli.main([*run.words(tiny_checkpoint, *INLINE, "--max-tokens", "4", "--no-progress")]) == 0
        closed = run.by_index()
    assert answers[4]["id"] == "by url"
    assert answers[3]["token_ids"] == answers[4]["token_ids"] == answers[5]["token_ids"]
    assert answers[6]["usage"]["prompt_tokens"] > answers[4]["usage"]["prompt_tokens"] + 10
    told = {index: answers[index]["error"] for index in (1, 2, 7, 8, 9)}
    assert "timed out; the timeout is 1.5 s (timeout)" in told[1]
    assert told[1].startswith(repr(mute))
    assert "no connection to" in told[2] and told[2].endswith("(refused)")
    assert "the status 404 (status)" in told[7]
    assert "not a picture" in told[8]
    assert told[9].endswith("(not allowed)")
    # Without the flag none of them is fetched, and the file is answered all the same.
    assert closed[3]["token_ids"] == answers[3]["token_ids"]
    assert all(closed[index]["error"].endswith("(not allowed)") for index in (1, 2, 4, 5, 6, 7, 8, 9))


def test_each_line_is_answered_once_however_often_the_run_is_killed(tmp_path: Path, picture: str) -> None:
    lines = [
        {"prompt": f"line {index}", "max_tokens": 1 + index * 7 % 20, "id": f"n{index}"}
        | ({"images": ["a.png"], "prompt": f"<image> {index}"} if index % 5 == 0 else {})
        | ({"promt": "wrong"} if index % 11 == 0 else {})
        for index in range(1, 61)
    ]
    whole, cut = FileRun(tmp_path, *lines), FileRun(tmp_path, *lines)
    whole.output = tmp_path / "whole.jsonl"
    assert cli.main(whole.words(DEMO, *FAKE)) == 0
    program = [sys.executable, str(Path(__file__).with_name("killed_runs.py")), "7", str(cut.output)]
    done = subprocess.run([*program, *cut.words(DEMO, *FAKE)], capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert [status for status, _ in ends] == [-9] * 4 + [0]
    # The kills came at different moments of the work, and not after it.
    assert len({count for _, count in ends}) >= 4
    assert max(count for _, count in ends[:-1]) < 60
    assert cut.by_index() == whole.by_index()


def test_a_run_is_gone_on_with_only_where_it_belongs(
    tiny_facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = FileRun(tmp_path, {"prompt": "a", "id": "one"}, {"prompt": "b", "id": "two"})
    words = run.words(tiny_facts, *FAKE)
    assert cli.main(words) == 0
    before = run.output.read_bytes()
    assert cli.main(words) == 1
    assert "exists and is not empty; --resume goes on with it" in capsys.readouterr().err
    run.input.write_text('{"prompt": "b", "id": "two"}\n{"prompt": "a", "id": "one"}\n')
    assert cli.main([*words, "--resume"]) == 1
    assert "the input was changed" in capsys.readouterr().err
    assert run.output.read_bytes() == before


def test_lines_added_to_the_input_are_answered_by_resuming(tiny_facts: Path, tmp_path: Path) -> None:
    run = FileRun(tmp_path, {"prompt": "a"}, {"prompt": "b", "top_p": 3})
    words = run.words(tiny_facts, *FAKE)
    assert cli.main(words) == 0
    before = run.output.read_text()
    with run.input.open("a") as file:
        file.write('{"prompt": "c"}\n')
    assert cli.main([*words, "--resume"]) == 0
    assert run.output.read_text().startswith(before)
    # A line with an error is answered; it is not tried again.
    assert [record["index"] for record in run.records()] == [2, 1, 3]


def test_a_line_that_comes_twice_is_written_once_and_missing_ones_are_told(
    tiny_facts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when Ray tries a task again."""
    skipped = {2, 5}

    def answer(config: EngineConfig, *, path: str, parts: LineParts, write: Any, **others: Any) -> None:
        source = LineSource(path, parts)
        for part in range(len(parts)):
            for index, raw in source.part(part) * 2:
                if index not in skipped:
                    write(AnsweredLine(parse_line(raw, index), {"text": "b"}))

    monkeypatch.setattr("dist_vlm.launch.batch_data.answer_by_replicas", answer)
    run = FileRun(tmp_path, *({"prompt": "a"} for _ in range(20)))
    words = run.words(tiny_facts, *FAKE, "--replicas", "2")
    assert cli.main(words) == 1
    assert "2 lines of the input have no answer; --resume tries them again" in capsys.readouterr().err
    assert sorted(run.by_index()) == [index for index in range(1, 21) if index not in skipped]
    skipped.clear()
    assert cli.main([*words, "--resume"]) == 0
    assert sorted(run.by_index()) == list(range(1, 21))


@pytest.mark.parametrize("inputs", [["--prompt", "x"], ["--input", "{input}", "--output", "{output}"]])
def test_more_replicas_for_a_server_are_not_for_a_batch(
    tiny_facts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inputs: list[str]
) -> None:
    given: list[EngineConfig] = []

    def keep(config: EngineConfig, *others: Any, **more: Any) -> str:
        given.append(config)
        return ""

    monkeypatch.setattr("dist_vlm.launch.generate._answer", keep)
    monkeypatch.setattr("dist_vlm.launch.generate._answer_lines", keep)
    (tmp_path / "c.yaml").write_text(f"model: {{model: {tiny_facts}}}\nscaling: {{max_replicas: 4}}\n")
    run = FileRun(tmp_path, {"prompt": "a"})
    words = [word.format(input=run.input, output=run.output) for word in inputs]
    assert cli.main(["generate", "--config", str(tmp_path / "c.yaml"), "--no-progress", *words]) == 0
    assert [config.most_replicas for config in given] == [1]


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--input", "absent.jsonl", "--output", "x"], 2, "--input = 'absent.jsonl': must be an existing file"),
        (["--input", "{input}"], 2, "--input needs --output FILE"),
        (["--input", "{input}", "--output", "{input}"], 2, "must be another file than --input"),
        (["--input", "{input}", "--output", "{input}", "--resume"], 2, "must be another file than --input"),
        (["--input", "{input}", "--output", "x", "--image", "a.png"], 2, "--image goes with --prompt"),
        (["--input", "{input}", "--output", "x", "--media-root", "absent"], 2, "must be an existing directory"),
        (["--input", "{input}", "--output", "absent/x"], 1, "absent/x"),
        (
            ["--input", "{input}", "--output", "x", "--max-image-mib", "0"],
            2,
            "--max-image-mib = '0': must be a number, above 0",
        ),
        (["--input", "{input}", "--output", "x", "--allowed-media-networks", "x"], 2, "must be a network"),
        (["--input", "{input}", "--output", "x", "--allowed-media-hosts", "a b"], 2, "--allowed-media-hosts"),
    ],
)
def test_a_wrong_use_of_files_is_refused_before_anything_starts(
    llm: type[ScriptedLLM],
    tiny_facts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    message: str,
) -> None:
    content = '{"prompt": "an input without a last newline"}'
    (tmp_path / "in.jsonl").write_text(content)
    words = [word.format(input=tmp_path / "in.jsonl") for word in words]
    assert cli.main(["generate", "--model", str(tiny_facts), *words]) == status
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert llm.made == []
    assert (tmp_path / "in.jsonl").read_text() == content
