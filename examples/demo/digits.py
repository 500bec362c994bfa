"""Pictures of handwritten digits: the 1797 scans of 8 x 8 pixels that scikit-learn carries, drawn large."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from examples.demo.questions import NUMBERS, QA

SCAN_SIDE = 8
SCAN_PEAK = 16  # the scans hold 0 (paper) to 16 (ink)
MARGIN = 8  # empty scan pixels added on each side, so that a moved or turned scan never runs into its own edge
RGB = tuple[int, int, int]


@dataclass(frozen=True)
class Digit:
    """One scan, how large, where and how it lies in the unit square, and its two colours."""

    label: int
    scan: bytes
    scale: tuple[float, float]
    shift: tuple[float, float]
    angle: float
    shear: float
    gamma: float
    ink: RGB
    paper: RGB

    @property
    def key(self) -> bytes:
        """The scan itself: the train / held-out split goes by it."""
        return self.scan

    def draw(self, width: int, height: int) -> Image.Image:
        """The digit in the centred square of a `width` x `height` RGB picture, both in pixels."""
        scan = np.frombuffer(self.scan, dtype=np.uint8).reshape(SCAN_SIDE, SCAN_SIDE).astype(np.float32)
        grey = 255 * (scan / SCAN_PEAK) ** self.gamma
        padded = Image.fromarray(np.pad(grey, MARGIN).round().astype(np.uint8))
        moved = (width, height), Image.Transform.AFFINE, self._inverse_map(width, height)
        mask = padded.transform(*moved, resample=Image.Resampling.BICUBIC)
        return Image.composite(Image.new("RGB", mask.size, self.ink), Image.new("RGB", mask.size, self.paper), mask)

    def _inverse_map(self, width: int, height: int) -> tuple[float, ...]:
        """The six numbers PIL wants: from a picture's pixel to a pixel of the padded scan."""
        side = min(width, height)
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        per_pixel = [SCAN_SIDE / (side * scale) for scale in self.scale]
        rows = ((cos + self.shear * sin, sin - self.shear * cos), (-sin, cos))
        centre = (width / 2 + self.shift[0] * side, height / 2 + self.shift[1] * side)
        middle = MARGIN + SCAN_SIDE / 2
        numbers: list[float] = []
        for unit, (a, b) in zip(per_pixel, rows, strict=True):
            numbers += [unit * a, unit * b, middle - unit * (a * centre[0] + b * centre[1])]
        return tuple(numbers)


@cache
def load_scans() -> tuple[tuple[int, bytes], ...]:
    """(label, the 64 bytes of the scan), in scikit-learn's order; the data comes with scikit-learn."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return tuple((int(y), x.astype(np.uint8).tobytes()) for x, y in zip(data.images, data.target, strict=True))


def sample_digit(rng: random.Random, scan: tuple[int, bytes], *, upright: bool) -> Digit:
    """A picture of the scan: `upright` as its writer wrote it, otherwise turned, sheared and stretched."""
    turn = 0.0 if upright else 1.0
    scale = rng.uniform(0.6, 0.95)
    dark, light = (tuple(rng.randint(low, low + 60) for _ in range(3)) for low in (0, 190))
    ink, paper = (dark, light) if rng.random() < 0.7 else (light, dark)
    return Digit(
        label=scan[0],
        scan=scan[1],
        scale=(scale * (1 + turn * rng.uniform(-0.15, 0.15)), scale * (1 + turn * rng.uniform(-0.1, 0.1))),
        shift=(rng.uniform(-0.1, 0.1), rng.uniform(-0.06, 0.06)),
        angle=turn * rng.uniform(-0.25, 0.25),
        shear=turn * rng.uniform(-0.25, 0.25),
        gamma=1 + turn * rng.uniform(-0.3, 0.4),
        ink=(ink[0], ink[1], ink[2]),
        paper=(paper[0], paper[1], paper[2]),
    )


def ask(digit: Digit, kind: str, rng: random.Random) -> QA:
    return QA(kind, *KINDS[kind](digit, rng))


def _digit(digit: Digit, rng: random.Random) -> tuple[str, str]:
    words = ("What digit is written?", "Which digit do you see?", "What digit is this?")
    return rng.choice(words), str(digit.label)


def _digit_word(digit: Digit, rng: random.Random) -> tuple[str, str]:
    return rng.choice(("Write the digit as a word.", "Spell the digit.")), NUMBERS[digit.label]


def _parity(digit: Digit, rng: random.Random) -> tuple[str, str]:
    return "Is the digit even or odd?", "odd" if digit.label % 2 else "even"


def _describe(digit: Digit, rng: random.Random) -> tuple[str, str]:
    question = rng.choice(("Describe the picture.", "What is in the picture?", "What do you see?"))
    return question, f"There is one handwritten digit: {NUMBERS[digit.label]}."


Maker = Callable[[Digit, random.Random], tuple[str, str]]
SHORT_KINDS: dict[str, Maker] = {"digit": _digit, "digit_word": _digit_word, "parity": _parity}
LONG_KINDS: dict[str, Maker] = {"describe_digit": _describe}
KINDS: dict[str, Maker] = {**SHORT_KINDS, **LONG_KINDS}
