"""The demo's tokenizer: byte-level BPE, learnt from the questions and answers alone, so it encodes any text."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from examples.demo import digits, questions, shapes

UNK, BOS, EOS, IMAGE, PAD = "<unk>", "<s>", "</s>", "<image>", "<pad>"
BASE_VOCAB = 510  # an upper bound: merges end when every word of the corpus is one token
CORPUS_PICTURES = 4000
PREFIX = f"USER: {IMAGE}\n"
SUFFIX = " ASSISTANT:"


def prompt(question: str) -> str:
    """The text a model of this family is asked with: one picture, one question."""
    return f"{PREFIX}{question}{SUFFIX}"


def train_tokenizer() -> Tokenizer:
    """Ids 0, 1, 2 are <unk>, <s>, </s>; then the 256 bytes, the learnt merges, <image> and <pad>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB,
        special_tokens=[UNK, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in (IMAGE, PAD)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))


def load_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _corpus() -> Iterator[str]:
    rng = random.Random("tokenizer")
    for _ in range(CORPUS_PICTURES):
        scene = shapes.sample_scene(rng)
        digit = digits.sample_digit(rng, (rng.randrange(10), bytes(64)), upright=True)
        asked = [questions.ask(scene, kind, rng) for kind in questions.KINDS]
        asked += [digits.ask(digit, kind, rng) for kind in digits.KINDS]
        for qa in asked:
            if qa is not None:
                yield prompt(qa.question).replace(IMAGE, "")
                yield qa.answer
