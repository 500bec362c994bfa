"""Starts ranks for the parity tests, one set at a time, and lends them out."""

from __future__ import annotations

from pathlib import Path

from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.rank_config import executor_for
from dist_vlm.executor.base import Executor, ExecutorInfo
from dist_vlm.llm import LLM

from .borrowed import BorrowedExecutor

# Sizes the ranks are started with; an engine over them may claim less.
_STARTED_WITH = {"max_model_len": 512, "max_num_seqs": 64, "max_num_batched_tokens": 8192, "max_steps_in_flight": 2}


class Ranks:
    """The ranks of one checkpoint and rank count; asking for another ends those running."""

    def __init__(self) -> None:
        self._key: tuple[Path, int, str] | None = None
        self._executor: Executor | None = None
        self._info: ExecutorInfo | None = None
        self._next_step_id = 0
        self._loan: BorrowedExecutor | None = None

    def engine(
        self,
        checkpoint: Path,
        *,
        num_ranks: int,
        budget: int = 8192,
        num_blocks: int | None = None,
        max_model_len: int = 512,
        executor: str = "ray",
        kernels: str = "torch",
        dtype: str = "float32",
        transport: str = "ray",
        halve_step_tokens: int | None = None,
        **changes: object,
    ) -> tuple[LLM, BorrowedExecutor]:
        """An LLM over started ranks, with its own token budget, number of KV blocks, and `changes` of the driver's
        fields."""
        self._end_loan()
        key = (checkpoint, num_ranks, f"{executor} {kernels} {dtype} {transport} {halve_step_tokens}")
        config = self._config(checkpoint, num_ranks, executor, kernels, dtype)
        config = config.replace(transport=transport, halve_step_tokens=halve_step_tokens)
        if key != self._key:
            self.close()
            self._executor = executor_for(resolve(config))
            self._info = self._executor.start()
            self._key, self._next_step_id = key, 0
        assert self._executor is not None and self._info is not None
        self._loan = BorrowedExecutor(
            self._executor, self._info, first_step_id=self._next_step_id, num_blocks=num_blocks
        )
        config = config.replace(max_num_batched_tokens=budget, max_model_len=max_model_len, **changes)
        return LLM.from_config(config, executor=self._loan), self._loan

    def _config(self, checkpoint: Path, num_ranks: int, executor: str, kernels: str, dtype: str) -> EngineConfig:
        return EngineConfig.from_fields(
            model=str(checkpoint),
            tensor_parallel_size=num_ranks,
            executor=executor,
            kernels=kernels,
            dtype=dtype,
            device="cpu",
            kv_cache_memory_gib=0.125,
            **_STARTED_WITH,
        )

    def _end_loan(self) -> None:
        if self._loan is not None:
            self._loan.shutdown()
            self._next_step_id = self._loan.next_step_id
            self._loan = None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown()
        self._executor = self._key = self._loan = None
