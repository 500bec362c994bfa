"""Training rows, drawn and tokenized before training starts, by several processes."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from examples.demo import digits, questions
from examples.demo.dataset import SIDES, Example, Picture, sample_split_scene, split_scans
from examples.demo.digits import sample_digit
from examples.demo.packing import NUM_SHORT, Packer
from examples.demo.questions import QA
from examples.demo.tokenizer import load_tokenizer

DIGIT_SHARE = 0.15
CHUNK = 500


@dataclass(frozen=True)
class Rows:
    """`pictures` uint8 [n, side, side, 3]; `tokens` and `targets` int16 [n, tokens], see packing."""

    pictures: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Source:
    """What decides the rows: a seed, the tokenizer's folder, the model's picture side in pixels and image tokens."""

    seed: int
    folder: Path
    side: int
    num_image_tokens: int


def training_rows(source: Source, count: int, *, processes: int) -> Rows:
    """Rows 0 to `count`. Row i depends on the source and i alone, not on the number of processes."""
    spans = [(source, start, min(count, start + CHUNK)) for start in range(0, count, CHUNK)]
    if processes <= 1:
        chunks = [_build_span(span) for span in spans]
    else:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        with get_context("fork").Pool(processes) as pool:
            chunks = pool.map(_build_span, spans, chunksize=1)
    return Rows(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))


def held_out_rows(source: Source, examples: Sequence[Example]) -> Rows:
    """One row for each example, its question in the first slot or, if it is a long one, in the last."""
    packer = _packer(source)
    pictures, packed = [], []
    for example in examples:
        is_long = example.qa.kind in {**questions.LONG_KINDS, **digits.LONG_KINDS}
        asked = [None] * NUM_SHORT + [example.qa] if is_long else [example.qa] + [None] * NUM_SHORT
        packed.append(packer.pack(asked))
        side = min(example.width, example.height)
        pictures.append(resize(example.picture.draw(side, side), source.side))
    return Rows(np.stack(pictures), np.stack([p[0] for p in packed]), np.stack([p[1] for p in packed]))


def resize(image: Image.Image, side: int) -> np.ndarray:
    """A square picture as the checkpoint's image processor resizes it: uint8 [side, side, 3]."""
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


def training_picture(rng: random.Random) -> tuple[Picture, list[QA | None]]:
    """A picture that is not held out, with questions for the slots of a row."""
    if rng.random() < DIGIT_SHARE:
        digit = sample_digit(rng, rng.choice(split_scans(held_out=False)), upright=False)
        kinds = [rng.choice(tuple(digits.SHORT_KINDS)) for _ in range(NUM_SHORT)] + list(digits.LONG_KINDS)
        return digit, [digits.ask(digit, kind, rng) for kind in kinds]
    scene = sample_split_scene(rng, held_out=False)
    kinds = rng.sample(tuple(questions.SHORT_KINDS), len(questions.SHORT_KINDS))
    short = [qa for qa in (questions.ask(scene, kind, rng) for kind in kinds) if qa is not None][:NUM_SHORT]
    missing: list[QA | None] = [None] * (NUM_SHORT - len(short))
    return scene, [*short, *missing, questions.ask(scene, rng.choice(tuple(questions.LONG_KINDS)), rng)]


def _build_span(span: tuple[Source, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    source, start, stop = span
    packer = _packer(source)
    pictures, packed = [], []
    for index in range(start, stop):
        rng = random.Random(f"train/{source.seed}/{index}")
        picture, asked = training_picture(rng)
        side = rng.randint(*SIDES)
        pictures.append(resize(picture.draw(side, side), source.side))
        packed.append(packer.pack(asked))
    return np.stack(pictures), np.stack([p[0] for p in packed]), np.stack([p[1] for p in packed])


@cache
def _packer(source: Source) -> Packer:
    return Packer(load_tokenizer(source.folder), source.num_image_tokens)
