"""How the tokens of an answer are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

LogitsProcessor = Callable[[list[int], Any], Any]

# Below this temperature the distribution is all at its maximum: sampling is greedy.
GREEDY_TEMPERATURE = 1e-5


@dataclass
class SamplingParams:
    """Sampling parameters with OpenAI's names and meanings, and those of the seed's API beside them.

    n: answers for one prompt. best_of: answers generated to choose the n from (None: n).
    presence_penalty, frequency_penalty: in [-2, 2]. repetition_penalty: in (0, 2], 1 for none.
    temperature: 0 (below 1e-5) is greedy. top_p: probability mass kept, in (0, 1].
    top_k: candidates kept, -1 for all. min_p: least probability kept, relative to the likeliest, in [0, 1].
    seed: makes the request's draws its own and repeatable; None or -1 lets the engine choose.
    stop: strings that end the answer. stop_token_ids: tokens that end it.
    ignore_eos: go on past the model's end-of-sequence token.
    max_tokens, min_tokens: bounds of the answer's length in tokens.
    logprobs, prompt_logprobs: alternatives to report for each token of the answer, of the prompt.
    detokenize: whether to produce text. skip_special_tokens: leave special tokens out of it.
    logits_processors: functions (generated token ids, logits) -> logits.
    truncate_prompt_tokens: keep only this many of the prompt's last tokens.

    Raises `ValueError` naming the field, its value and what is allowed. A valid value that the engine does not
    serve is refused when the request is made, never ignored.
    """

    n: int = 1
    best_of: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    seed: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logits_processors: list[LogitsProcessor] | None = None
    truncate_prompt_tokens: int | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_together()

    def _normalise(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = list(self.stop) if self.stop is not None else []
        self.stop_token_ids = list(self.stop_token_ids) if self.stop_token_ids is not None else []
        if self.seed == -1:
            self.seed = None
        if self.best_of is None:
            self.best_of = self.n

    def _check_numbers(self) -> None:
        _integer("n", self.n, low=1)
        _integer("best_of", self.best_of, low=1)
        _number("presence_penalty", self.presence_penalty, "in [-2, 2]", lambda v: -2 <= v <= 2)
        _number("frequency_penalty", self.frequency_penalty, "in [-2, 2]", lambda v: -2 <= v <= 2)
        _number("repetition_penalty", self.repetition_penalty, "in (0, 2]", lambda v: 0 < v <= 2)
        _number("temperature", self.temperature, "a finite number, at least 0", lambda v: v >= 0)
        _number("top_p", self.top_p, "in (0, 1]", lambda v: 0 < v <= 1)
        _integer("top_k", self.top_k, low=-1)
        if self.top_k == 0:
            raise ValueError("top_k = 0: must be -1 (all) or at least 1")
        _number("min_p", self.min_p, "in [0, 1]", lambda v: 0 <= v <= 1)
        _number("length_penalty", self.length_penalty, "a finite number", lambda v: True)
        _integer("seed", self.seed, low=0, high=2**63 - 1, optional=True)
        _integer("max_tokens", self.max_tokens, low=1, optional=True)
        _integer("min_tokens", self.min_tokens, low=0)
        _integer("logprobs", self.logprobs, low=0, optional=True)
        _integer("prompt_logprobs", self.prompt_logprobs, low=0, optional=True)
        _integer("truncate_prompt_tokens", self.truncate_prompt_tokens, low=1, optional=True)

    def _check_together(self) -> None:
        assert self.best_of is not None and isinstance(self.stop, list) and self.stop_token_ids is not None
        if self.best_of < self.n:
            raise ValueError(f"best_of = {self.best_of}: must be at least n = {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens}: must be at most max_tokens = {self.max_tokens}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise ValueError(f"stop = {self.stop!r}: must hold strings that are not empty")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop = {self.stop!r}: needs detokenize=True, stop strings are found in text")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, low=0)
        if self.is_greedy:
            if self.best_of > 1:
                raise ValueError(f"best_of = {self.best_of}: must be 1 when sampling greedily (temperature = 0)")
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, -1, 0.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    def clone(self) -> SamplingParams:
        """An independent copy."""
        return SamplingParams(**{item.name: getattr(self, item.name) for item in fields(self)})


def _integer(name: str, value: Any, *, low: int, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    allowed = f"an integer, at least {low}" + (f" and at most {high}" if high is not None else "")
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


def _number(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> None:
    # A larger whole number than a float can hold is no number here.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if not is_number or not fits(value):
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


# Valid fields that the engine does not serve yet, with the value that asks for nothing.
_NOT_SERVED: Sequence[tuple[str, Any]] = (
    ("n", 1),
    ("best_of", 1),
    ("presence_penalty", 0),
    ("frequency_penalty", 0),
    ("repetition_penalty", 1),
    ("min_p", 0),
    ("use_beam_search", False),
    ("length_penalty", 1),
    ("early_stopping", False),
    ("stop", []),
    ("include_stop_str_in_output", False),
    ("min_tokens", 0),
    ("logprobs", None),
    ("prompt_logprobs", None),
    ("spaces_between_special_tokens", True),
    ("logits_processors", None),
    ("truncate_prompt_tokens", None),
)


def refuse_unserved(params: SamplingParams) -> None:
    """Raises `ValueError` naming the first field whose value the engine does not serve."""
    for name, neutral in _NOT_SERVED:
        value = getattr(params, name)
        if value != neutral:
            raise ValueError(f"{name} = {value!r}: not served by this version; leave it at {neutral!r}")
