"""How the tokens of an answer are chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

LogitsProcessor = Callable[[list[int], Any], Any]

# Below this temperature the distribution is all at its maximum: sampling is greedy.
GREEDY_TEMPERATURE = 1e-5

# What one request may ask for: each answer takes a slot, and each of the rest is looked at for every token.
MAX_ANSWERS = 64
MAX_STOP_STRINGS = 16
MAX_STOP_TOKENS = 256
MAX_LOGIT_BIASES = 300
MAX_BAD_WORDS = 128
MAX_LOGITS_PROCESSORS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BAD_WORD_CHARACTERS = 128
# A smaller one would make infinities of logits.
MIN_REPETITION_PENALTY = 0.001


@dataclass
class SamplingParams:
    """Sampling parameters with OpenAI's names and meanings, and those of the seed's API beside them.

    n: answers for one prompt. best_of: answers generated to choose the n with the highest cumulative log probability
        from (None: n); at most 64. With best_of > n no answer is shown before all have ended.
    presence_penalty, frequency_penalty: in [-2, 2]. repetition_penalty: in [0.001, 2], 1 for none.
    temperature: 0 (below 1e-5) is greedy. top_p: probability mass kept, in (0, 1].
    top_k: candidates kept, -1 for all. min_p: least probability kept, relative to the likeliest, in [0, 1].
    seed: makes the request's draws its own and repeatable; None or -1 lets the engine choose. The answers of one
        request differ in any case.
    stop: strings that end the answer, at most 16 of at most 1024 characters. The one that is complete first ends it,
        the longest of several at once. include_stop_str_in_output: keep it, or the text of the stop token, in the text.
    stop_token_ids: tokens that end it, at most 256.
    ignore_eos: go on past the model's end-of-sequence token.
    max_tokens, min_tokens: bounds of the answer's length in tokens. Stop tokens are not sampled before min_tokens
        tokens, and a stop string that is complete before them does not count.
    logprobs: alternatives to report for each token of the answer, 0 for the token alone; None reports nothing.
    prompt_logprobs: the same for each token of the prompt. Both at most the engine's max_logprobs.
    detokenize: whether to produce text. skip_special_tokens: leave special tokens out of it.
    spaces_between_special_tokens: True leaves to the tokenizer what stands between special tokens; False asks for
        nothing there, and is refused where the tokenizer puts spaces.
    logits_processors: functions (generated token ids, logits) -> logits, called with each token's logits, at most 16.
        Served where the rank runs in this process: executor='inline'.
    truncate_prompt_tokens: keep only this many of the prompt's last tokens. No image may be cut.
    logit_bias: token id -> number in [-100, 100] added to its logit, at most 300 of them.
    bad_words: words that the answer shall not hold, at most 128 of at most 128 characters. What is barred are the
        tokens that the tokenizer makes of each, with and without a space before it; the same letters in other tokens,
        inside a longer word for example, are not.

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
    logit_bias: dict[int, float] | None = None
    bad_words: list[str] | None = None

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_flags()
        self._check_lists()
        self._check_together()

    def _normalise(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else _listed("stop", self.stop)
        self.stop_token_ids = _listed("stop_token_ids", self.stop_token_ids)
        self.bad_words = _listed("bad_words", self.bad_words) or None
        self.logits_processors = _listed("logits_processors", self.logits_processors) or None
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise ValueError(f"logit_bias = {self.logit_bias!r}: must be a mapping of token ids to numbers")
            self.logit_bias = dict(self.logit_bias) or None
        if self.seed == -1:
            self.seed = None
        if self.best_of is None:
            self.best_of = self.n

    def _check_numbers(self) -> None:
        _integer("n", self.n, low=1, high=MAX_ANSWERS)
        _integer("best_of", self.best_of, low=1, high=MAX_ANSWERS)
        _number("presence_penalty", self.presence_penalty, "in [-2, 2]", lambda v: -2 <= v <= 2)
        _number("frequency_penalty", self.frequency_penalty, "in [-2, 2]", lambda v: -2 <= v <= 2)
        least = MIN_REPETITION_PENALTY
        _number("repetition_penalty", self.repetition_penalty, f"in [{least}, 2]", lambda v: least <= v <= 2)
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

    def _check_flags(self) -> None:
        for name in (
            "use_beam_search",
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise ValueError(f"{name} = {value!r}: must be True or False")

    def _check_lists(self) -> None:
        assert isinstance(self.stop, list) and self.stop_token_ids is not None
        _texts("stop", self.stop, most=MAX_STOP_STRINGS, longest=MAX_STOP_CHARACTERS)
        _count("stop_token_ids", self.stop_token_ids, most=MAX_STOP_TOKENS)
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, low=0)
        _texts("bad_words", self.bad_words or (), most=MAX_BAD_WORDS, longest=MAX_BAD_WORD_CHARACTERS)
        _count("logit_bias", self.logit_bias or (), most=MAX_LOGIT_BIASES)
        for token, bias in (self.logit_bias or {}).items():
            _integer("logit_bias: token id", token, low=0)
            _number(f"logit_bias[{token}]", bias, "in [-100, 100]", lambda v: -100 <= v <= 100)
        _count("logits_processors", self.logits_processors or (), most=MAX_LOGITS_PROCESSORS)
        for processor in self.logits_processors or ():
            if not callable(processor):
                raise ValueError(f"logits_processors holds {processor!r}: must hold functions")

    def _check_together(self) -> None:
        assert self.best_of is not None
        if self.best_of < self.n:
            raise ValueError(f"best_of = {self.best_of}: must be at least n = {self.n}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens}: must be at most max_tokens = {self.max_tokens}")
        if self.stop and not self.detokenize:
            raise ValueError(f"stop = {self.stop!r}: needs detokenize=True, stop strings are found in text")
        if self.is_greedy:
            if self.best_of > 1:
                raise ValueError(f"best_of = {self.best_of}: must be 1 when sampling greedily (temperature = 0)")
            self.temperature, self.top_p, self.top_k, self.min_p = 0.0, 1.0, -1, 0.0

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def watches_logprobs(self) -> bool:
        """Whether the log probabilities of the answer's tokens are computed: to be shown, or to rank answers by."""
        return self.logprobs is not None or self.best_of != self.n

    def clone(self) -> SamplingParams:
        """An independent copy, checked anew."""
        return SamplingParams(**{item.name: getattr(self, item.name) for item in fields(self)})


def _listed(name: str, values: Any) -> list[Any]:
    if values is None:
        return []
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, (Sequence, set, frozenset)):
        raise ValueError(f"{name} of type {type(values).__name__}: must be a list")
    return list(values)


def _count(name: str, values: Any, *, most: int) -> None:
    if len(values) > most:
        raise ValueError(f"{name} has {len(values)} entries: must have at most {most}")


def _texts(name: str, values: Sequence[Any], *, most: int, longest: int) -> None:
    _count(name, values, most=most)
    for text in values:
        if not isinstance(text, str) or not text:
            raise ValueError(f"{name} = {values!r}: must hold strings that are not empty")
        if len(text) > longest:
            raise ValueError(f"{name} holds a string of {len(text)} characters: must have at most {longest}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} holds {text[error.start]!r}, half of a surrogate pair: not text") from None


def _integer(name: str, value: Any, *, low: int, high: int | None = None, optional: bool = False) -> None:
    if value is None and optional:
        return
    allowed = f"an integer, at least {low}" + (f" and at most {high}" if high is not None else "")
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


def _number(name: str, value: Any, allowed: str, fits: Callable[[float], bool]) -> None:
    # A larger whole number than a float can hold is no number here, and NaN is below nothing.
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if not is_number or not fits(value):
        raise ValueError(f"{name} = {value!r}: must be {allowed}")


_NO_BEAMS = "beam search is not served; use best_of with a temperature above 0, or temperature=0"

# Valid fields that are not served: the value that asks for nothing, and what to use instead.
_NOT_SERVED: Sequence[tuple[str, Any, str]] = (
    ("use_beam_search", False, _NO_BEAMS),
    ("length_penalty", 1, _NO_BEAMS),
    ("early_stopping", False, _NO_BEAMS),
)


def refuse_unserved(params: SamplingParams, *, serves_logits_processors: bool) -> None:
    """Raises `ValueError` naming the first field whose value the engine does not serve."""
    for name, neutral, instead in _NOT_SERVED:
        value = getattr(params, name)
        if value != neutral:
            raise ValueError(f"{name} = {value!r}: not served by this version ({instead}); leave it at {neutral!r}")
    if params.logits_processors and not serves_logits_processors:
        raise ValueError(
            "logits_processors: served only with executor='inline', where the rank runs in this process; use "
            "logit_bias or bad_words, or leave it at None"
        )
