"""One request as its client sees it: its answers and times as they come."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from dist_vlm.engine.answer_log import AnswerLog
from dist_vlm.engine.logprobs_view import TokenTexts, logprobs_view
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.processor import ProcessedPrompt
from dist_vlm.engine.stop_strings import StopStrings
from dist_vlm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from dist_vlm.sampling import SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class RequestLog:
    """Turns the `EngineOutput`s of a request's engine requests into one growing `RequestOutput`.

    A request ends with its last answer, or with the first that fails: then it has failed whole.

    processors, processors_name: its logits processors, and the name under which the ranks know them; empty without.
    eos_token_ids: tokens whose stop is reported without a stop_reason.
    only_end: whether nobody looks at the output before its end; see `AnswerLog`.
    """

    def __init__(
        self,
        processed: ProcessedPrompt,
        params: SamplingParams,
        *,
        tokenizer: PreTrainedTokenizerFast,
        eos_token_ids: Collection[int],
        only_end: bool = False,
    ) -> None:
        params = params.clone()  # the caller's own may change
        self._params = params
        self._metrics = RequestMetrics(arrival_time=time.time())
        prompt_token_ids = list(processed.requests[0].prompt_token_ids)
        self._texts = TokenTexts(tokenizer) if params.detokenize else None
        stop_strings = StopStrings(params.stop or ())
        self._answers = {
            request.request_id: AnswerLog(
                CompletionOutput(index=index, text="", token_ids=[]),
                params,
                prompt_token_ids=prompt_token_ids,
                tokenizer=tokenizer,
                texts=self._texts,
                watch=stop_strings.watch(),
                eos_token_ids=eos_token_ids,
                only_end=only_end,
            )
            for index, request in enumerate(processed.requests)
        }
        # What may be the best n of more is not shown before it is known.
        self._ranks_at_end = len(self._answers) > params.n
        shown = [CompletionOutput(index=index, text="", token_ids=[]) for index in range(params.n)]
        self.output = RequestOutput(
            request_id=processed.request_id,
            prompt=processed.prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=shown if self._ranks_at_end else [log.answer for log in self._answers.values()],
            finished=False,
            prompt_logprobs=[None] if params.prompt_logprobs is not None else None,
            metrics=self._metrics,
        )
        self._num_preemptions = dict.fromkeys(self._answers, 0)
        self._first_id = next(iter(self._answers))
        self._in_engine = set(self._answers)
        self._num_open = len(self._answers)
        self.processors_name = processed.requests[0].sampling.processors
        self.processors = tuple(params.logits_processors or ())
        self._unwanted: list[str] = []

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Of the engine requests, one an answer."""
        return tuple(self._answers)

    def take(self, news: EngineOutput) -> RequestOutput:
        """Adds news of one of the answers; returns the request's output so far, the same object each time."""
        if news.finish_reason is not None:
            self._in_engine.discard(news.request_id)
        log = self._answers[news.request_id]
        if self.output.finished or log.answer.finished():
            return self.output
        now = time.time()
        self._note(news, now)
        if news.prompt_logprobs:
            self._add_prompt_logprobs(news)
        if log.take(news):
            self._drop([news.request_id])
        self._num_open -= log.answer.finished()
        if log.answer.finish_reason == "error":
            self._fail(str(news.stop_reason), now)
        elif not self._num_open:
            self._finish(now)
        return self.output

    def fail(self, cause: str) -> RequestOutput:
        """Ends the request with an error; nothing if it has ended already."""
        if not self.output.finished:
            self._fail(cause, time.time())
        return self.output

    def pop_unwanted(self) -> list[str]:
        """Engine requests that have ended here alone since the last call: the engine must abort them."""
        unwanted, self._unwanted = self._unwanted, []
        return unwanted

    def _note(self, news: EngineOutput, now: float) -> None:
        metrics = self._metrics
        if news.new_token_ids:
            if metrics.first_token_time is None:
                metrics.first_token_time = now
            metrics.last_token_time = now
        scheduled, first = news.first_scheduled_time, metrics.first_scheduled_time
        if scheduled is not None and (first is None or scheduled < first):
            metrics.first_scheduled_time = scheduled
            metrics.time_in_queue = scheduled - metrics.arrival_time
        if news.num_preemptions:
            self.output.num_preemptions += news.num_preemptions - self._num_preemptions[news.request_id]
            self._num_preemptions[news.request_id] = news.num_preemptions
        if news.num_cached_tokens > self.output.num_cached_tokens and news.request_id == self._first_id:
            # The others find what the first one computed.
            self.output.num_cached_tokens = news.num_cached_tokens

    def _add_prompt_logprobs(self, news: EngineOutput) -> None:
        known, count = self.output.prompt_logprobs, self._params.prompt_logprobs
        assert known is not None and count is not None, "the engine tells log probabilities where asked"
        for entry in news.prompt_logprobs:
            token = self.output.prompt_token_ids[len(known)]
            known.append(logprobs_view(token, entry, num_alternatives=count, texts=self._texts))

    def _finish(self, now: float) -> None:
        self._metrics.finished_time = now
        self.output.finished = True
        if self._ranks_at_end:
            self.output.outputs = self._best()

    def _fail(self, cause: str, now: float) -> None:
        for log in self._answers.values():
            log.end("error", cause)
        self._drop(self._in_engine)
        self.output.error = cause
        self._finish(now)

    def _best(self) -> list[CompletionOutput]:
        """The n answers with the highest cumulative log probabilities; those that failed or were aborted come last."""
        answers = [log.answer for log in self._answers.values()]
        answers.sort(key=lambda answer: (answer.finish_reason in ("abort", "error"), -_known(answer)))
        best = answers[: self._params.n]
        for index, answer in enumerate(best):
            answer.index = index
        return best

    def _drop(self, request_ids: Collection[str]) -> None:
        self._unwanted.extend(one for one in self._answers if one in request_ids)
        self._in_engine.difference_update(self._unwanted)


def _known(answer: CompletionOutput) -> float:
    assert answer.cumulative_logprob is not None, "the engine tells log probabilities where answers are ranked"
    return answer.cumulative_logprob
