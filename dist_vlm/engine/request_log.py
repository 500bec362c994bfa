"""One request as its client sees it: text, tokens and times as they come."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from dist_vlm.engine.detokenizer import Detokenizer
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.processor import ProcessedPrompt
from dist_vlm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from dist_vlm.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RequestLog:
    """Turns `EngineOutput`s into growing `RequestOutput`s.

    eos_token_ids: tokens whose stop is reported without a stop_reason.
    """

    def __init__(
        self,
        processed: ProcessedPrompt,
        params: SamplingParams,
        *,
        tokenizer: PreTrainedTokenizerFast,
        eos_token_ids: Collection[int],
    ) -> None:
        request = processed.request
        self._eos_token_ids = eos_token_ids
        self._answer = CompletionOutput(index=0, text="", token_ids=[])
        self._metrics = RequestMetrics(arrival_time=time.time())
        self.output = RequestOutput(
            request_id=request.request_id,
            prompt=processed.prompt,
            prompt_token_ids=list(request.prompt_token_ids),
            outputs=[self._answer],
            finished=False,
            metrics=self._metrics,
        )
        self._detokenizer = (
            Detokenizer(tokenizer, request.prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
            if params.detokenize
            else None
        )

    def take(self, news: EngineOutput) -> RequestOutput:
        """Adds news of the request; returns its output so far, the same object each time."""
        now = time.time()
        if news.new_token_ids:
            if self._metrics.first_token_time is None:
                self._metrics.first_token_time = now
            self._metrics.last_token_time = now
        self._answer.token_ids.extend(news.new_token_ids)
        if self._detokenizer is not None:
            self._detokenizer.add(news.new_token_ids)
        if news.first_scheduled_time is not None:
            self._metrics.first_scheduled_time = news.first_scheduled_time
            self._metrics.time_in_queue = news.first_scheduled_time - self._metrics.arrival_time
        self.output.num_preemptions = news.num_preemptions
        if news.finish_reason is not None:
            self._finish(news, now)
        if self._detokenizer is not None:
            self._answer.text = self._detokenizer.text
        return self.output

    def _finish(self, news: EngineOutput, now: float) -> None:
        self._metrics.finished_time = now
        self._answer.finish_reason = news.finish_reason
        if news.stop_reason not in self._eos_token_ids:
            self._answer.stop_reason = news.stop_reason
        if news.finish_reason == "error":
            self.output.error = str(news.stop_reason)
        self.output.finished = True
        if self._detokenizer is not None:
            self._detokenizer.finish()
