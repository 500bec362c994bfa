"""The offline API: prompts in, answers out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.arg_utils import engine_config
from dist_vlm.engine.chat import ChatOptions
from dist_vlm.engine.core import EngineCore
from dist_vlm.engine.front import Front, load_front
from dist_vlm.engine.jobs import is_batch, jobs_of, one_source
from dist_vlm.engine.make_core import make_core
from dist_vlm.engine.offline_loop import OfflineLoop
from dist_vlm.executor.base import Executor, ExecutorInfo
from dist_vlm.inputs import PromptInputs
from dist_vlm.machine import usable_cores
from dist_vlm.outputs import RequestOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.sched.scheduler import SchedulerStats

# Threads that prepare pictures. Each makes a hundred a second, nearly all of it outside Python's lock; more would only
# keep the step loop from that lock.
_MAX_PREPARERS = 4


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
        if config.parallel.engine_process:
            raise ValueError("engine_process = True: an LLM runs the step loop in its caller's thread; use AsyncLLM")
        self.config = config
        self._core = make_core(config, executor)
        preparers = ThreadPoolExecutor(min(_MAX_PREPARERS, usable_cores()), thread_name_prefix="prepare")
        self._finalizer = weakref.finalize(self, _end, self._core, preparers)
        # The tokenizer and the image processor load while the ranks start.
        serves_processors = self._core.serves_logits_processors
        loading = preparers.submit(load_front, config, serves_logits_processors=serves_processors)
        try:
            if config.parallel.executor == "inline":
                loading.result()  # two threads that import parts of one library may meet half a module
            self.executor_info: ExecutorInfo = self._core.start()  # of the first ranks, where others took their place
            self._front: Front = loading.result()
        except BaseException:
            self.shutdown()
            raise
        self._loop = OfflineLoop(
            self._core,
            self._front,
            max_num_seqs=config.scheduler.max_num_seqs,
            preparers=preparers,
            ending=self._finalizer,
        )

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
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answers prompts; returns one `RequestOutput` a prompt, in their order.

        prompts (or inputs): one prompt or several, in any form of `dist_vlm.inputs`.
        sampling_params: one for all, or one for each prompt; None takes `SamplingParams()`.
        prompt_token_ids: prompts in tokens, in place of `prompts` (the older form).
        priority: one for all, or one for each prompt; lower runs first.

        A single prompt that cannot be served raises `ValueError`. Of several, it fails alone: its output has
        `error` set and the finish reason "error", a warning names it, and the others are answered. Raises
        `ExecutorError` if the ranks are lost.
        """
        if lora_request is not None:
            raise ValueError(f"lora_request = {lora_request!r}: not served; leave it at None")
        given = one_source(prompts, inputs, prompt_token_ids)
        jobs = list(jobs_of(given, sampling_params, priority))
        final: dict[str, RequestOutput] = {}
        with tqdm(total=len(jobs), desc="Processed prompts", disable=not use_tqdm, dynamic_ncols=True) as bar:
            for output in self._loop.run(iter(jobs), raise_errors=not is_batch(given), only_ends=True):
                final[output.request_id] = output
                bar.update()
        return sorted(final.values(), key=lambda output: int(output.request_id))

    def stream(
        self,
        prompts: PromptInputs | Iterable[PromptInputs],
        sampling_params: SamplingParams | Iterable[SamplingParams] | None = None,
        *,
        priority: int | Iterable[int] = 0,
    ) -> Iterator[RequestOutput]:
        """Like `generate`, but yields a request's output each time there is news of it: the same object, whole so far.

        prompts: one, or any iterable of them, from which no more are drawn than the engine can take in; the others
            wait. So may be sampling_params and priority, one for each prompt. Request ids count up in that order.
            A prompt's pictures must not be changed before there is news of it.

        Leaving the iteration early aborts what has not ended.
        """
        yield from self._loop.run(jobs_of(prompts, sampling_params, priority), raise_errors=not is_batch(prompts))

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool = True,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answers conversations in OpenAI's form: one list of messages, or a list of several.

        A message's content is a string or a list of parts, {"type": "text", "text": ...}, {"type": "image", "image": a
        PIL picture} or {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}, in any order and turn.
        chat_template: Jinja; None takes the tokenizer's. add_generation_prompt: begin the assistant's answer.

        Where a text spells a special token it stays text. Errors are those of `generate`; a wrong template raises
        `ValueError` whatever the number of conversations.
        """
        options = ChatOptions(chat_template=chat_template, add_generation_prompt=add_generation_prompt)
        prompts: Any = self._front.chat.inputs(messages, options)
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm, priority=priority)

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


def _end(core: EngineCore, preparers: ThreadPoolExecutor) -> None:
    preparers.shutdown(wait=False, cancel_futures=True)
    core.shutdown()
