"""The prompts of one call, each with its sampling parameters and priority."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_vlm.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """What a client asks for, unchecked."""

    inputs: Any
    params: Any
    priority: Any


def is_batch(inputs: Any) -> bool:
    """Whether these are several prompts, if only one of them, and no single prompt."""
    return isinstance(inputs, Iterable) and not isinstance(inputs, (str, Mapping))


def one_source(prompts: Any, inputs: Any, prompt_token_ids: Any) -> Any:
    """The prompts, from whichever of the three arguments holds them."""
    given = [value for value in (prompts, inputs, prompt_token_ids) if value is not None]
    if len(given) != 1:
        raise ValueError(f"{len(given)} of prompts, inputs and prompt_token_ids are given: must be exactly one")
    if prompt_token_ids is None:
        return given[0]
    if prompt_token_ids and isinstance(prompt_token_ids[0], int):
        return {"prompt_token_ids": prompt_token_ids}
    return [{"prompt_token_ids": token_ids} for token_ids in prompt_token_ids]


def jobs_of(inputs: Any, sampling_params: Any, priority: Any) -> Iterator[Job]:
    """One job a prompt, each made when it is asked for: nothing is drawn from an iterator before.

    sampling_params, priority: one for all, or one for each prompt. Raises `ValueError` where there are fewer than
    prompts, or more in a list: at once where both numbers are known, else when it turns out.
    """
    if sampling_params is None:
        sampling_params = SamplingParams()
    elif not isinstance(sampling_params, SamplingParams) and not is_batch(sampling_params):
        kind = type(sampling_params).__name__
        raise ValueError(f"sampling_params of type {kind}: must be a SamplingParams or a list")
    prompts = inputs if is_batch(inputs) else (inputs,)
    columns = {"sampling_params": sampling_params, "priority": priority}
    for name, column in columns.items():
        if is_batch(column) and isinstance(column, Sequence) and isinstance(prompts, Sequence):
            _check_length(name, len(column), len(prompts))
    return _drawn(prompts, columns)


def _drawn(prompts: Iterable[Any], columns: Mapping[str, Any]) -> Iterator[Job]:
    iterators = {name: iter(column) for name, column in columns.items() if is_batch(column)}
    count = 0
    for prompt in prompts:
        values = dict(columns)
        for name, iterator in iterators.items():
            values[name] = next(iterator, _ENDED)
            if values[name] is _ENDED:
                raise ValueError(f"{name} has {count} entries and there are more prompts: must be one, or one each")
        count += 1
        yield Job(prompt, values["sampling_params"], values["priority"])
    for name in iterators:
        if isinstance(columns[name], Sequence):
            _check_length(name, len(columns[name]), count)


def _check_length(name: str, entries: int, prompts: int) -> None:
    if entries != prompts:
        raise ValueError(f"{name} has {entries} entries for {prompts} prompts: must be one, or one each")


_ENDED = object()
