"""The offline API: prompts in, answers out."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.arg_utils import engine_config
from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.front import Front, load_front
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.processor import ProcessedPrompt
from dist_vlm.engine.rank_config import executor_for
from dist_vlm.engine.request_log import RequestLog
from dist_vlm.executor.base import Executor, ExecutorError, ExecutorInfo
from dist_vlm.inputs import PromptInputs
from dist_vlm.outputs import CompletionOutput, RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.sched.scheduler import SchedulerStats

_log = logging.getLogger(__name__)

# Requests prepared between two steps while a long list is worked off: pictures are decoded as they are needed.
_PREPARED_PER_STEP = 16
# Beyond this, pictures wait in the caller's form; at least one request is always let in.
_MAX_STAGED_BYTES = 512 << 20

_Job = tuple[Any, SamplingParams]


class LLM:
    """A vision-language model on tensor-parallel ranks, for offline use.

    model: directory of a checkpoint. tensor_parallel_size: ranks, placed by Ray. The other keywords are the
    fields of `EngineConfig` by their flat names, and those of the seed's engine arguments that are served;
    anything else is refused by name. Raises `ConfigError` (a `ValueError`) for a wrong value and `StartError`
    if the ranks do not start.

    Use it as a context manager, or call `shutdown()`, to end the ranks before the process ends.
    """

    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        tokenizer_mode: str = "auto",
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        dtype: str = "auto",
        quantization: str | None = None,
        revision: str | None = None,
        tokenizer_revision: str | None = None,
        seed: int = 0,
        gpu_memory_utilization: float = 0.9,
        swap_space: int = 4,
        enforce_eager: bool = False,
        max_context_len_to_capture: int | None = None,
        max_seq_len_to_capture: int = 8192,
        disable_custom_all_reduce: bool = False,
        **kwargs: Any,
    ) -> None:
        config = engine_config(
            model=model,
            tokenizer=tokenizer,
            tokenizer_mode=tokenizer_mode,
            skip_tokenizer_init=skip_tokenizer_init,
            trust_remote_code=trust_remote_code,
            tensor_parallel_size=tensor_parallel_size,
            dtype=dtype,
            quantization=quantization,
            revision=revision,
            tokenizer_revision=tokenizer_revision,
            seed=seed,
            gpu_memory_utilization=gpu_memory_utilization,
            swap_space=swap_space,
            enforce_eager=enforce_eager,
            max_context_len_to_capture=max_context_len_to_capture,
            max_seq_len_to_capture=max_seq_len_to_capture,
            disable_custom_all_reduce=disable_custom_all_reduce,
            **kwargs,
        )
        self._start(resolve(config), None)

    @classmethod
    def from_config(cls, config: EngineConfig, *, executor: Executor | None = None) -> LLM:
        """From a configuration, resolved or not.

        executor: takes the place of the one the configuration names, for example a `FakeExecutor` in tests.
        """
        llm = cls.__new__(cls)
        llm._start(resolve(config), executor)
        return llm

    def _start(self, config: EngineConfig, executor: Executor | None) -> None:
        if config.parallel.replicas != 1:
            raise ValueError(
                f"replicas = {config.parallel.replicas}: an LLM drives one tensor-parallel group; must be 1 here"
            )
        if not config.observability.disable_log_stats:
            raise ValueError("disable_log_stats = False: not served by this version; leave it at True")
        self.config = config
        self._dead: ExecutorError | None = None
        self._ids = itertools.count()
        # What a step told of requests whose run was not the one that asked for the step.
        self._news: deque[EngineOutput] = deque()
        self._core = EngineCore(
            executor or executor_for(config),
            block_size=config.cache.block_size,
            max_model_len=_decided(config.model.max_model_len),
            max_num_seqs=config.scheduler.max_num_seqs,
            max_num_batched_tokens=config.scheduler.max_num_batched_tokens,
        )
        self._finalizer = weakref.finalize(self, self._core.shutdown)
        # The tokenizer and the image processor load while the ranks start.
        with ThreadPoolExecutor(1) as pool:
            loading = pool.submit(load_front, config)
            try:
                self.executor_info: ExecutorInfo = self._core.start()
                self._front: Front = loading.result()
            except BaseException:
                self.shutdown()
                raise

    # ---------------------------------------------------------------- public

    def generate(
        self,
        prompts: PromptInputs | Sequence[PromptInputs] | None = None,
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        prompt_token_ids: list[int] | list[list[int]] | None = None,
        use_tqdm: bool = True,
        lora_request: None = None,
        *,
        inputs: PromptInputs | Sequence[PromptInputs] | None = None,
    ) -> list[RequestOutput]:
        """Answers prompts; returns one `RequestOutput` a prompt, in their order.

        prompts (or inputs): one prompt or several, in any form of `dist_vlm.inputs`.
        sampling_params: one for all, or one for each prompt; None takes `SamplingParams()`.
        prompt_token_ids: prompts in tokens, in place of `prompts` (the older form).

        A single prompt that cannot be served raises `ValueError`. Of several, it fails alone: its output has
        `error` set and the finish reason "error", a warning names it, and the others are answered. Raises
        `ExecutorError` if the ranks are lost.
        """
        if lora_request is not None:
            raise ValueError(f"lora_request = {lora_request!r}: not served; leave it at None")
        given = _one_source(prompts, inputs, prompt_token_ids)
        jobs = _jobs(given, sampling_params)
        final: dict[str, RequestOutput] = {}
        is_single = not _is_batch(given)
        with tqdm(total=len(jobs), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            for output in self._run(jobs, raise_errors=is_single):
                if output.finished:
                    final[output.request_id] = output
                    bar.update()
        return sorted(final.values(), key=lambda output: int(output.request_id))

    def stream(
        self,
        prompts: PromptInputs | Sequence[PromptInputs],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields a request's output each time it has grown: the same object, whole so far.

        Leaving the iteration early aborts what has not ended.
        """
        yield from self._run(_jobs(prompts, sampling_params), raise_errors=not _is_batch(prompts))

    def encode(self, *args: Any, **kwargs: Any) -> None:
        """Embeddings are not served. Raises `ValueError`."""
        raise ValueError("LLM.encode() is only for embedding models; this model generates: use LLM.generate()")

    def get_tokenizer(self) -> Any:
        """The tokenizer, a `transformers` one."""
        return self._front.tokenizer

    @property
    def stats(self) -> SchedulerStats:
        """The scheduler's counts since the start."""
        return self._core.stats

    def shutdown(self) -> None:
        """Ends the ranks. May be called more than once."""
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.shutdown()

    # --------------------------------------------------------------- the loop

    def _run(self, jobs: Iterable[_Job], *, raise_errors: bool) -> Iterator[RequestOutput]:
        """Works jobs off and yields their outputs. Several runs may be under way: each step serves all of them."""
        waiting = deque((str(next(self._ids)), job) for job in jobs)
        mine: dict[str, RequestLog] = {}
        try:
            while waiting or mine:
                yield from self._submit_some(waiting, mine, raise_errors=raise_errors)
                news = [self._news.popleft() for _ in range(len(self._news))]
                if not any(one.request_id in mine for one in news) and mine:
                    news.extend(self._step())
                self._news.extend(one for one in news if one.request_id not in mine)
                for one in news:
                    if one.request_id in mine:
                        output = mine[one.request_id].take(one)
                        if output.finished:
                            del mine[one.request_id]
                        if output.error is not None and raise_errors:
                            raise ValueError(f"the request failed: {output.error}")
                        yield output
        finally:
            for request_id in mine:
                self._core.abort(request_id)
            self._news = deque(one for one in self._news if one.request_id not in mine)

    def _step(self) -> list[EngineOutput]:
        """One step of the engine. Whatever goes wrong in it, an interrupt too, ends the engine: its books and the
        ranks' no longer agree."""
        self._check_alive()
        try:
            return self._core.step()
        except ExecutorError as error:
            self._dead = error
            self.shutdown()
            raise
        except BaseException as error:
            self._dead = ExecutorError("step", f"the engine was broken off by {type(error).__name__}")
            self.shutdown()
            raise

    def _check_alive(self) -> None:
        if self._dead is not None:
            raise self._dead
        if not self._finalizer.alive:
            raise RuntimeError("this LLM is shut down")

    def _submit_some(
        self, waiting: deque[tuple[str, _Job]], mine: dict[str, RequestLog], *, raise_errors: bool
    ) -> Iterator[RequestOutput]:
        """Prepares a few more requests while fewer than two rounds of slots, and not too many bytes of images, are in
        the engine; yields the failed."""
        limit = 2 * self.config.scheduler.max_num_seqs
        for _ in range(_PREPARED_PER_STEP):
            if not waiting or len(mine) >= limit or (mine and self._core.staged_bytes > _MAX_STAGED_BYTES):
                return
            self._check_alive()
            request_id, (inputs, params) = waiting.popleft()
            try:
                processed = self._prepare(request_id, inputs, params)
                self._core.add(processed.request)
            except ValueError as error:
                if raise_errors:
                    raise
                _log.warning("request %s failed: %s", request_id, error)
                yield _failed(request_id, inputs, str(error))
                continue
            mine[request_id] = self._new_log(processed, params)

    def _prepare(self, request_id: str, inputs: Any, params: SamplingParams) -> ProcessedPrompt:
        """Raises `ValueError` alone: what else a library raises on a request's data goes to the log."""
        try:
            return self._front.processor.process(request_id, inputs, params)
        except (ValueError, ExecutorError):
            raise
        except Exception as error:
            _log.exception("request %s could not be prepared", request_id)
            raise ValueError(f"the request could not be prepared ({type(error).__name__})") from error

    def _new_log(self, processed: ProcessedPrompt, params: SamplingParams) -> RequestLog:
        return RequestLog(
            processed, params, tokenizer=self._front.tokenizer, eos_token_ids=self._front.spec.eos_token_ids
        )


def _decided(value: int | None) -> int:
    assert value is not None, "resolve() decides it"
    return value


def _is_batch(inputs: Any) -> bool:
    return isinstance(inputs, Sequence) and not isinstance(inputs, str)


def _one_source(prompts: Any, inputs: Any, prompt_token_ids: Any) -> Any:
    """The prompts, from whichever of the three arguments holds them."""
    given = [value for value in (prompts, inputs, prompt_token_ids) if value is not None]
    if len(given) != 1:
        raise ValueError(f"{len(given)} of prompts, inputs and prompt_token_ids are given: must be exactly one")
    if prompt_token_ids is None:
        return given[0]
    if prompt_token_ids and isinstance(prompt_token_ids[0], int):
        return {"prompt_token_ids": prompt_token_ids}
    return [{"prompt_token_ids": token_ids} for token_ids in prompt_token_ids]


def _jobs(inputs: Any, sampling_params: SamplingParams | Sequence[SamplingParams] | None) -> list[_Job]:
    prompts = list(inputs) if _is_batch(inputs) else [inputs]
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        return [(prompt, sampling_params) for prompt in prompts]
    if not _is_batch(sampling_params):
        raise ValueError(
            f"sampling_params of type {type(sampling_params).__name__}: must be a SamplingParams or a list"
        )
    if len(sampling_params) != len(prompts):
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts: must be one, or one each"
        )
    return list(zip(prompts, sampling_params, strict=True))


def _failed(request_id: str, inputs: Any, error: str) -> RequestOutput:
    """The output of a request that was refused before it began."""
    prompt = inputs if isinstance(inputs, str) else inputs.get("prompt") if isinstance(inputs, dict) else None
    answer = CompletionOutput(index=0, text="", token_ids=[], finish_reason="error", stop_reason=error)
    return RequestOutput(request_id, prompt, [], [answer], finished=True, error=error)
