"""What transformers' own model makes of the probes, in float32: the tokens and log probabilities to compare with."""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dist_vlm.engine.front import load_chat
from dist_vlm.launch.probes import Probe
from dist_vlm.launch.prompts import chat_turn

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig


@dataclass(frozen=True, eq=False, slots=True)
class ReferenceAnswer:
    """A probe, its prompt, and what transformers answers.

    prompt: the text given to the tokenizer, with one placeholder for each picture.
    prompt_token_ids: the same in tokens, the pictures expanded.
    token_ids: chosen greedily, going on past an end of sequence.
    logprobs: float32 [prompt tokens + answer tokens - 1, vocabulary]; row i is the distribution of the token at i + 1.
    """

    probe: Probe
    prompt: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: Tensor

    def row(self, index: int) -> Tensor:
        """The distribution of the answer's token `index`."""
        return self.logprobs[len(self.prompt_token_ids) - 1 + index]


class Reference:
    """One checkpoint in transformers, computing in float32 with the weights as the configured runtime holds them:
    where the runtime's type is shorter than the checkpoint's, rounded to it.

    device: "cpu" or "cuda".
    """

    def __init__(self, config: EngineConfig, *, device: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

        path, local = config.model.model, {"local_files_only": True}
        with _quiet():
            self._processor: Any = AutoProcessor.from_pretrained(path, backend="pil", **local)
            model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, **local)
        self._take_parts(config)
        self._chat = load_chat(config, self._processor.tokenizer)
        dtype = getattr(torch, config.model.dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(dtype))
        # The checkpoint's own settings may sample, penalise or stop: none of it is to count here.
        model.generation_config = GenerationConfig(do_sample=False)
        self._model = model.eval().to(device)
        self._device = device

    def _take_parts(self, config: EngineConfig) -> None:
        """The tokenizer and the image processor, where the configuration names other directories for them."""
        from transformers import AutoImageProcessor, AutoTokenizer

        tokenizer, processor = config.model.tokenizer, config.vision.image_processor
        if tokenizer is not None and tokenizer != config.model.model:
            self._processor.tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        if processor is not None and processor != config.model.model:
            self._processor.image_processor = AutoImageProcessor.from_pretrained(
                processor, backend="pil", local_files_only=True
            )

    @torch.inference_mode()
    def answer(self, probe: Probe, *, num_tokens: int) -> ReferenceAnswer:
        """num_tokens: length of the answer."""
        prompt = self._prompt(probe)
        inputs = self._inputs(probe, prompt)
        with _full_float32():
            first = self._model(**inputs).logits[0]
            generated = self._model.generate(
                **inputs, max_new_tokens=num_tokens, output_logits=True, return_dict_in_generate=True
            )
        # generate() gives the rows of its own tokens alone; the last prompt row is in both.
        logits = torch.cat([first.cpu(), *(row.cpu() for row in generated.logits[1:])])
        prompt_token_ids = inputs["input_ids"][0].tolist()
        return ReferenceAnswer(
            probe=probe,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            token_ids=generated.sequences[0, len(prompt_token_ids) :].tolist(),
            logprobs=torch.log_softmax(logits, dim=-1),
        )

    @torch.inference_mode()
    def own_difference(self, answers: Sequence[ReferenceAnswer], dtype: str, *, top: int) -> float:
        """How far transformers itself, computing in `dtype`, is from its answers in float32: the highest difference
        of log probabilities over the prompts, at the `top` likeliest tokens. The model stays in `dtype`."""
        to = getattr(torch, dtype)
        for parameter in self._model.parameters():  # buffers, such as rotary frequencies, stay in float32
            parameter.data = parameter.data.to(to)
        highest = 0.0
        for answer in answers:
            inputs = self._inputs(answer.probe, answer.prompt)
            cast = {key: value.to(to) if value.is_floating_point() else value for key, value in inputs.items()}
            own = torch.log_softmax(self._model(**cast).logits[0].float().cpu(), dim=-1)
            tokens = own.topk(top).indices
            difference = own.gather(1, tokens) - answer.logprobs[: own.shape[0]].gather(1, tokens)
            highest = max(highest, difference.abs().max().item())
        return highest

    def _inputs(self, probe: Probe, prompt: str) -> Any:
        inputs = self._processor(images=list(probe.pictures) or None, text=[prompt], return_tensors="pt")
        return inputs.to(self._device)

    def _prompt(self, probe: Probe) -> str:
        if self._chat.has_template:
            return chat_turn(self._chat, probe.question, num_pictures=len(probe.pictures))[0]
        return "".join(f"{self._processor.image_token}\n" for _ in probe.pictures) + probe.question


def release_memory(device: str) -> None:
    """Gives back what a `Reference` that nobody holds any more took: on its GPU ranks may start."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _full_float32() -> Any:
    """GPUs round the factors of float32 convolutions to 10 bits of mantissa unless told not to."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks about the checkpoint."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
