"""Asks the checkpoint about held-out pictures and counts the answers that are right to the letter.

    python -m examples.demo.evaluate --backend transformers
    python -m examples.demo.evaluate --backend two-ranks        # this runtime, two tensor-parallel ranks through Ray

Greedy, in float32, on the stored weights. The figures go to figures.json; equal digests mean equal tokens throughout.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dist_vlm import LLM, SamplingParams
from examples.demo.dataset import Example, held_out_examples
from examples.demo.figures import FOLDER, code_commit, environment, update_figures
from examples.demo.tokenizer import prompt

MAX_NEW_TOKENS = 64
BATCH = 50


@dataclass(frozen=True)
class Reply:
    """What a model said: its text without special tokens, and its token ids with the end token."""

    text: str
    token_ids: tuple[int, ...]


Answer = Callable[[Sequence[str], Sequence[Image.Image]], list[Reply]]


@dataclass(frozen=True)
class Verdict:
    example: Example
    reply: Reply

    @property
    def is_right(self) -> bool:
        return self.reply.text == self.example.qa.answer


def transformers_answer(checkpoint: Path, device: str) -> Answer:
    model = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    torch.nn.Module.to(model, device)
    processor = AutoProcessor.from_pretrained(checkpoint, backend="pil")
    end = model.generation_config.eos_token_id

    def answer(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Reply]:
        inputs = processor(text=list(prompts), images=list(images), padding=True, return_tensors="pt").to(device)
        with torch.inference_mode():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
        replies = []
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            ids = row[: row.index(end) + 1] if end in row else row
            replies.append(Reply(processor.decode(ids, skip_special_tokens=True), tuple(ids)))
        return replies

    return answer


def runtime_answer(checkpoint: Path, device: str, *, ranks: int) -> Answer:
    llm = LLM(str(checkpoint), dtype="float32", device=device, tensor_parallel_size=ranks, kv_cache_memory_gib=0.25)
    params = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)

    def answer(prompts: Sequence[str], images: Sequence[Image.Image]) -> list[Reply]:
        asked: list[Any] = [
            {"prompt": text, "multi_modal_data": {"image": image}} for text, image in zip(prompts, images, strict=True)
        ]
        answers = [output.outputs[0] for output in llm.generate(asked, params, use_tqdm=False)]
        return [Reply(one.text, tuple(one.token_ids)) for one in answers]

    return answer


# a backend is a function of the checkpoint's folder and a device
BACKENDS: dict[str, Callable[[Path, str], Answer]] = {
    "transformers": transformers_answer,
    "one-rank": partial(runtime_answer, ranks=1),
    "two-ranks": partial(runtime_answer, ranks=2),
}


def ask_all(answer: Answer, examples: Sequence[Example]) -> list[Verdict]:
    verdicts = []
    for start in range(0, len(examples), BATCH):
        part = examples[start : start + BATCH]
        replies = answer([prompt(e.qa.question) for e in part], [e.draw() for e in part])
        verdicts += [Verdict(e, r) for e, r in zip(part, replies, strict=True)]
    return verdicts


def summarize(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    kinds = dict.fromkeys(v.example.qa.kind for v in verdicts)
    by_kind = {kind: [v.is_right for v in verdicts if v.example.qa.kind == kind] for kind in kinds}
    right = sum(v.is_right for v in verdicts)
    return {
        "asked": len(verdicts),
        "right": right,
        "exact_match": round(right / len(verdicts), 4),
        "by_kind": {kind: f"{sum(found)}/{len(found)}" for kind, found in by_kind.items()},
        "tokens_digest": hashlib.sha256(repr([v.reply.token_ids for v in verdicts]).encode()).hexdigest()[:16],
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=sorted(BACKENDS), default="transformers")
    parser.add_argument("--label", help="the figures' name in the file, by default the backend's")
    parser.add_argument("--checkpoint", type=Path, default=FOLDER / "checkpoint")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="which held-out pictures")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--commit", default=code_commit(), help="of this code, where it is no git checkout")
    parser.add_argument("--figures", type=Path, default=FOLDER / "figures.json")
    asked = parser.parse_args(arguments)

    answer = BACKENDS[asked.backend](asked.checkpoint, asked.device)
    started = time.perf_counter()
    verdicts = ask_all(answer, held_out_examples(asked.count, asked.seed))
    figures = {**summarize(verdicts), "seed": asked.seed, "seconds": round(time.perf_counter() - started, 1)}
    update_figures(
        asked.figures,
        ("evaluation", asked.label or asked.backend),
        {**figures, **environment(asked.device, asked.commit)},
    )
    for verdict in verdicts:
        if not verdict.is_right:
            qa = verdict.example.qa
            print(f"wrong  {qa.kind}: {qa.question!r}  expected {qa.answer!r}  said {verdict.reply.text!r}")
    print(f"{asked.backend}: {figures['right']} of {figures['asked']} answered exactly, {figures['seconds']} s")


if __name__ == "__main__":
    main(sys.argv[1:])
