"""From a line of a file of requests to what the engine takes, and from the engine's output to the line's answer."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from dist_vlm.config_fields import nearest
from dist_vlm.engine.chat import ChatOptions
from dist_vlm.launch.local_media import is_data_url
from dist_vlm.launch.prompts import with_pictures

if TYPE_CHECKING:
    from dist_vlm import CompletionOutput, RequestOutput, SamplingParams
    from dist_vlm.config import VisionConfig
    from dist_vlm.engine.chat import ChatRenderer
    from dist_vlm.inputs import TextPrompt, TextTokensPrompt
    from dist_vlm.launch.jsonl import Line
    from dist_vlm.launch.local_media import LocalMedia

_PROMPT_KEYS = ("prompt", "images", "messages")
_FUNCTIONS = "logits_processors"  # cannot be written in JSON

_log = logging.getLogger(__name__)


class RequestMaker:
    """Decodes a line's pictures when it is asked for the line's request, not before.

    defaults: sampling of the lines that do not say otherwise.
    """

    def __init__(
        self, *, chat: ChatRenderer, vision: VisionConfig, media: LocalMedia, defaults: SamplingParams
    ) -> None:
        self._chat = chat
        self._vision = vision
        self._media = media
        self._defaults = {field.name: getattr(defaults, field.name) for field in dataclasses.fields(defaults)}
        # Filled in from `n` where it was not given; a line may change `n`.
        if defaults.best_of == defaults.n:
            self._defaults["best_of"] = None

    def make(self, line: Line) -> tuple[Any, SamplingParams]:
        """A prompt in a form of `LLM.generate`, and its sampling.

        Raises `ValueError` saying what is wrong with the line; what a library says goes to the log.
        """
        try:
            return self._make(line)
        except ValueError:
            raise
        except Exception as error:
            _log.debug("line %d could not be prepared", line.index, exc_info=True)
            raise ValueError(f"the line could not be prepared ({type(error).__name__})") from error

    def _make(self, line: Line) -> tuple[Any, SamplingParams]:
        if line.problem is not None:
            raise ValueError(line.problem)
        values = line.values
        allowed = [*_PROMPT_KEYS, *(name for name in self._defaults if name != _FUNCTIONS)]
        for key in values:
            if key not in allowed:
                raise ValueError(f"unknown key {key!r}{nearest(key, allowed)}")
        params = self._params({key: value for key, value in values.items() if key not in _PROMPT_KEYS})
        if values.get("messages") is None:
            return self._prompt(values), params
        for key in ("prompt", "images"):
            if values.get(key) is not None:
                raise ValueError(f"{key} and messages are both given: messages hold their own text and pictures")
        return self._conversation(values["messages"]), params

    def _params(self, given: dict[str, Any]) -> SamplingParams:
        from dist_vlm import SamplingParams

        biases = given.get("logit_bias")
        if isinstance(biases, dict):  # JSON has no keys but strings
            given |= {"logit_bias": {_token(key): value for key, value in biases.items()}}
        return SamplingParams(**{**self._defaults, **given})

    def _prompt(self, values: dict[str, Any]) -> TextPrompt | TextTokensPrompt:
        prompt, names = values.get("prompt"), values.get("images")
        if not isinstance(prompt, str):
            raise ValueError(f"prompt = {prompt!r}: must be a string")
        names = [] if names is None else names
        if not isinstance(names, list):
            raise ValueError(f"images of type {type(names).__name__}: must be a list of file names")
        self._check_count(names)
        pictures = [self._media.load(name) for name in names]
        return with_pictures(self._chat, prompt, pictures)

    def _conversation(self, messages: Any) -> Any:
        """Messages with their files opened. What else may be wrong with them, the engine tells."""
        parts = [
            part
            for message in _listed(messages)
            for part in _listed(message.get("content") if isinstance(message, dict) else None)
            if isinstance(part, dict) and part.get("type") == "image_url"
        ]
        self._check_count(parts)
        for part in parts:
            holder = part.get("image_url")
            name = holder.get("url") if isinstance(holder, dict) else None
            if isinstance(name, str) and not is_data_url(name):
                part.clear()
                part.update({"type": "image", "image": self._media.load(name)})
        return self._chat.inputs(messages, ChatOptions())

    def _check_count(self, pictures: list[Any]) -> None:
        """Before any is decoded."""
        limit = self._vision.max_images_per_prompt
        if len(pictures) > limit:
            raise ValueError(f"the line has {len(pictures)} pictures; at most {limit} are allowed")


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
