"""From a line of a file of requests to what the engine takes, and from the engine's output to the line's answer."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dist_vlm.config_fields import nearest
from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.chat_content import Message, parse_messages
from dist_vlm.executor.base import ExecutorError
from dist_vlm.launch.prompts import with_pictures

if TYPE_CHECKING:
    from dist_vlm import CompletionOutput, RequestOutput, SamplingParams
    from dist_vlm.config import VisionConfig
    from dist_vlm.engine.chat import ChatRenderer
    from dist_vlm.launch.jsonl import Line

_PROMPT_KEYS = ("prompt", "images", "messages")
_FUNCTIONS = "logits_processors"  # cannot be written in JSON

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LineRequest:
    """A line that has been read and whose pictures have not.

    text: the prompt, or the conversation. pictures: their names as the line has them, in order.
    """

    text: str | tuple[Message, ...]
    pictures: Sequence[Any]
    params: SamplingParams

    def inputs(self, chat: ChatRenderer, images: Sequence[Any]) -> Any:
        """The prompt in a form of `AsyncLLM.generate`. images: what became of the pictures. Raises `ValueError`."""
        if isinstance(self.text, str):
            return with_pictures(chat, self.text, images)
        prompt, token_ids = chat.render_text(self.text, ChatOptions())
        return {"prompt": prompt, "prompt_token_ids": token_ids, "multi_modal_data": {"image": list(images)}}


class RequestReader:
    """Reads lines. Opens no picture.

    defaults: sampling of the lines that do not say otherwise.
    seed: where a line draws and has no seed, it gets one of this and its number: the same in every run.
    """

    def __init__(self, *, vision: VisionConfig, defaults: SamplingParams, seed: int) -> None:
        self._vision = vision
        self._seed = seed
        self._defaults = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
        # Filled in from `n` where it was not given; a line may change `n`.
        if defaults.best_of == defaults.n:
            self._defaults["best_of"] = None

    def read(self, line: Line) -> LineRequest:
        """Raises `ValueError` saying what is wrong with the line; what a library says goes to the log."""
        with line_faults(line.index):
            return self._read(line)

    def _read(self, line: Line) -> LineRequest:
        if line.problem is not None:
            raise ValueError(line.problem)
        values = line.values
        allowed = [*_PROMPT_KEYS, *(name for name in self._defaults if name != _FUNCTIONS)]
        for key in values:
            if key not in allowed:
                raise ValueError(f"unknown key {key!r}{nearest(key, allowed)}")
        params = self._params({key: value for key, value in values.items() if key not in _PROMPT_KEYS}, line.index)
        if values.get("messages") is None:
            return self._prompt(values, params)
        for key in ("prompt", "images"):
            if values.get(key) is not None:
                raise ValueError(f"{key} and messages are both given: messages hold their own text and pictures")
        return self._conversation(values["messages"], params)

    def _params(self, given: dict[str, Any], index: int) -> SamplingParams:
        from dist_vlm import SamplingParams

        biases = given.get("logit_bias")
        if isinstance(biases, dict):  # JSON has no keys but strings
            given |= {"logit_bias": {_token(key): value for key, value in biases.items()}}
        params = SamplingParams(**{**self._defaults, **given})
        if params.seed is None and params.temperature > 0:
            digest = hashlib.blake2b(f"{self._seed} line {index}".encode(), digest_size=8).digest()
            params.seed = int.from_bytes(digest, "little") >> 1
        return params

    def _prompt(self, values: dict[str, Any], params: SamplingParams) -> LineRequest:
        prompt, names = values.get("prompt"), values.get("images")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt = {prompt!r}: must be a string")
        names = [] if names is None else names
        if not isinstance(names, list):
            raise ValueError(f"images of type {type(names).__name__}: must be a list of file names")
        self._check_count(names)
        return LineRequest(prompt, names, params)

    def _conversation(self, messages: Any, params: SamplingParams) -> LineRequest:
        """Messages are checked with a short data: URL in the place of each picture's name: files have none of their own
        elsewhere, and what is long is not held twice."""
        names = []
        for part in _picture_parts(messages):
            holder = part.get("image_url")
            name = holder.get("url") if isinstance(holder, dict) else None
            if isinstance(holder, dict) and isinstance(name, str):
                names.append(name)
                part["image_url"] = {**holder, "url": "data:"}
        self._check_count(names)
        return LineRequest(parse_messages(messages, fetches=True), names, params)

    def _check_count(self, pictures: list[Any]) -> None:
        """Before any is decoded."""
        limit = self._vision.max_images_per_prompt
        if len(pictures) > limit:
            raise ValueError(f"the line has {len(pictures)} pictures; at most {limit} are allowed")


@contextmanager
def line_faults(index: int) -> Iterator[None]:
    """Turns what nobody foresaw about a line into its `ValueError`."""
    try:
        yield
    except (ValueError, ExecutorError):
        raise
    except Exception as error:
        _log.debug("line %d could not be prepared", index, exc_info=True)
        raise ValueError(f"the line could not be prepared ({type(error).__name__})") from error


def _picture_parts(messages: Any) -> list[dict[str, Any]]:
    return [
        part
        for message in _listed(messages)
        for part in _listed(message.get("content") if isinstance(message, dict) else None)
        if isinstance(part, dict) and part.get("type") == "image_url"
    ]


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _token(key: str) -> int:
    if not (key.isascii() and key.isdigit()):
        raise ValueError(f"logit_bias has the key {key!r}: must be the number of a token")
    return int(key)


def answer_of(output: RequestOutput) -> dict[str, Any]:
    """What is written for a finished request: its answer, its answers where there are several, or its error."""
    if output.error is not None:
        return {"error": output.error}
    answers = [_completion(one) for one in output.outputs]
    num_prompt = len(output.prompt_token_ids)
    num_answer = sum(len(one.token_ids) for one in output.outputs)
    usage = {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}
    answer: dict[str, Any] = answers[0] if len(answers) == 1 else {"outputs": answers}
    if output.prompt_logprobs is not None:
        answer["prompt_logprobs"] = _plain(output.prompt_logprobs)
    return answer | {"usage": usage}


def _completion(output: CompletionOutput) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        answer |= {"cumulative_logprob": output.cumulative_logprob, "logprobs": _plain(output.logprobs)}
    return answer


def _plain(positions: Any) -> list[dict[int, Any] | None]:
    """Log probabilities as JSON takes them: token id -> fields."""
    return [
        None if entries is None else {token: dataclasses.asdict(entry) for token, entry in entries.items()}
        for entries in positions
    ]
