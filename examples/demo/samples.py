"""Writes the shipped pictures: held-out ones of several sizes, with their prompts and the answers expected.

python -m examples.demo.samples
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from examples.demo import digits, questions
from examples.demo.dataset import Picture, sample_split_scene, split_scans
from examples.demo.digits import sample_digit
from examples.demo.figures import FOLDER
from examples.demo.questions import QA
from examples.demo.tokenizer import prompt

PICTURES = FOLDER / "pictures"
SEED = "a"
MIN_SHAPES = 3
# kind of question, width and height in pixels
SAMPLES = (
    ("count", 336, 336),
    ("colour", 200, 150),
    ("beside", 320, 240),
    ("relation", 224, 300),
    ("describe", 400, 400),
    ("describe_places", 640, 480),
    ("digit", 128, 128),
    ("digit_word", 280, 210),
)


def sample(kind: str) -> tuple[Picture, QA]:
    rng = random.Random(f"{SEED}/{kind}")
    if kind in digits.KINDS:
        digit = sample_digit(rng, rng.choice(split_scans(held_out=True)), upright=True)
        return digit, digits.ask(digit, kind, rng)
    while True:
        scene = sample_split_scene(rng, held_out=True)
        qa = questions.ask(scene, kind, rng)
        if qa is not None and len(scene.shapes) >= MIN_SHAPES:
            return scene, qa


def write_samples(folder: Path = PICTURES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for kind, width, height in SAMPLES:
        picture, qa = sample(kind)
        name = f"{kind.replace('_', '-')}.png"
        picture.draw(width, height).save(folder / name, optimize=True)
        entries.append({"image": name, "prompt": prompt(qa.question), "question": qa.question, "answer": qa.answer})
    (folder / "questions.json").write_text(json.dumps(entries, indent=2) + "\n")


if __name__ == "__main__":
    write_samples()
