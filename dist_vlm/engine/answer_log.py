"""One answer as its client sees it: text, tokens and log probabilities as they come."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

from dist_vlm.engine.detokenizer import Detokenizer
from dist_vlm.engine.logprobs_view import TokenTexts, logprobs_view
from dist_vlm.engine.messages import EngineOutput
from dist_vlm.engine.stop_strings import StopMatch, StopWatch
from dist_vlm.outputs import CompletionOutput
from dist_vlm.sampling import SamplingParams
from dist_vlm.workers.plan import TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class AnswerLog:
    """Turns one engine request's `EngineOutput`s into a growing `CompletionOutput`.

    texts: of single tokens, shared by a request's answers; None without detokenizing.
    eos_token_ids: tokens whose stop is reported without a stop_reason.
    only_end: whether nobody looks at the answer before its end. Without stop strings its text is then made at once
        when the engine ends it, and it has none if `end` does.
    """

    def __init__(
        self,
        answer: CompletionOutput,
        params: SamplingParams,
        *,
        prompt_token_ids: list[int],
        tokenizer: PreTrainedTokenizerFast,
        texts: TokenTexts | None,
        watch: StopWatch,
        eos_token_ids: Collection[int],
        only_end: bool = False,
    ) -> None:
        self.answer = answer
        self._params = params
        self._texts = texts
        self._watch = watch
        self._eos_token_ids = eos_token_ids
        self._holds_text = only_end and not params.stop
        self._detokenizer: Detokenizer | None = None
        if params.detokenize:
            self._detokenizer = Detokenizer(tokenizer, prompt_token_ids, skip_special_tokens=params.skip_special_tokens)
        if params.logprobs is not None:
            answer.logprobs = []
        if params.watches_logprobs:
            answer.cumulative_logprob = 0.0

    def take(self, news: EngineOutput) -> bool:
        """Adds news; returns whether the answer has ended here while the engine goes on with it."""
        if self.answer.finished():
            return False
        if self._holds_text and news.finish_reason is None and not news.logprobs:
            self.answer.token_ids += news.new_token_ids
            return False
        for index, token in enumerate(news.new_token_ids):
            is_stop = news.finish_reason == "stop" and index == len(news.new_token_ids) - 1
            match = self._add(token, news.logprobs[index] if news.logprobs else None, is_stop=is_stop)
            if match is not None:
                self._end("stop", match.string)
                return news.finish_reason is None
        if news.finish_reason is not None:
            self._finish(news)
        elif self._detokenizer is not None and not self._holds_text:
            self._show(self._watch.num_held)
        return False

    def end(self, reason: Literal["abort", "error"], cause: str | None) -> None:
        """Ends the answer as it stands; nothing if it has ended already."""
        if not self.answer.finished():
            self._end(reason, cause)

    def _add(self, token: int, entry: TokenLogprobs | None, *, is_stop: bool) -> StopMatch | None:
        """Adds one token; returns the stop string that it completes."""
        answer = self.answer
        answer.token_ids.append(token)
        if entry is not None:
            assert answer.cumulative_logprob is not None, "the engine tells log probabilities where asked"
            answer.cumulative_logprob += entry.logprob
            if answer.logprobs is not None:
                assert self._params.logprobs is not None
                view = logprobs_view(token, entry, num_alternatives=self._params.logprobs, texts=self._texts)
                answer.logprobs.append(view)
        if self._detokenizer is None or self._holds_text or (is_stop and not self._params.include_stop_str_in_output):
            return None
        piece = self._detokenizer.add(token)
        # A stop token has ended the answer, whatever its text completes.
        counts = not is_stop and len(answer.token_ids) >= self._params.min_tokens
        return self._read(piece, counts=counts)

    def _read(self, piece: str, *, counts: bool) -> StopMatch | None:
        """Looks for stop strings in new text; cuts the shown text at one that ends the answer."""
        match = self._watch.read(piece, counts=counts)
        if match is not None:
            cut = len(piece) - match.end
            if not self._params.include_stop_str_in_output:
                cut += len(match.string)
            self._show(cut)
        return match

    def _finish(self, news: EngineOutput) -> None:
        """The engine has ended the answer: what was held back comes out."""
        assert news.finish_reason is not None
        if self._detokenizer is not None:
            if self._holds_text:
                self._detokenizer.hold(self._tokens_with_text(news))
            counts = news.finish_reason == "length" and len(self.answer.token_ids) >= self._params.min_tokens
            match = self._read(self._detokenizer.finish(), counts=counts)
            if match is not None:
                self._end("stop", match.string)
                return
            self._show(0)
        self._end(news.finish_reason, None if news.stop_reason in self._eos_token_ids else news.stop_reason)

    def _tokens_with_text(self, news: EngineOutput) -> list[int]:
        """All of an answer that these news end, but for a stop token that is not shown."""
        tokens = self.answer.token_ids
        has_stop = news.finish_reason == "stop" and bool(news.new_token_ids)
        return tokens[:-1] if has_stop and not self._params.include_stop_str_in_output else tokens

    def _show(self, num_held: int) -> None:
        """Shows the text but for its last characters."""
        assert self._detokenizer is not None
        text = self._detokenizer.text
        self.answer.text = text[: len(text) - num_held]

    def _end(self, reason: str, cause: int | str | None) -> None:
        self.answer.finish_reason, self.answer.stop_reason = reason, cause
