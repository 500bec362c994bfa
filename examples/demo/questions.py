"""Questions about scenes of shapes, and their answers.

Every question is asked only where it has one answer: "the circle" only where there is one circle, "to the left of" only
where no shape stands in the same column.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from examples.demo.shapes import COLOURS, SHAPES, Scene, Shape

T = TypeVar("T")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = ("left", "right", "above", "below")
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the centre", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)


@dataclass(frozen=True)
class QA:
    kind: str
    question: str
    answer: str


def ask(scene: Scene, kind: str, rng: random.Random) -> QA | None:
    """A question of that kind about the scene, or None where the scene allows none of them."""
    found = KINDS[kind](scene, rng)
    return None if found is None else QA(kind, *found)


def _count(scene: Scene, rng: random.Random) -> tuple[str, str]:
    words = ("How many shapes are there?", "How many shapes do you see?", "Count the shapes.")
    return rng.choice(words), NUMBERS[len(scene.shapes)]


def _count_some(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.shapes)
    if rng.random() < 0.5:
        name = shape.name if rng.random() < 0.7 else rng.choice(SHAPES)
        what, number = plural(name), sum(s.name == name for s in scene.shapes)
    else:
        colour = shape.colour if rng.random() < 0.7 else rng.choice(tuple(COLOURS))
        what, number = f"{colour} shapes", sum(s.colour == colour for s in scene.shapes)
    return rng.choice((f"How many {what} are there?", f"How many {what} do you see?")), NUMBERS[number]


def _colour(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shape = _pick(rng, _unique(scene.shapes, "name"))
    if shape is None:
        return None
    return rng.choice((f"What colour is the {shape.name}?", f"Which colour has the {shape.name}?")), shape.colour


def _shape(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    shape = _pick(rng, _unique(scene.shapes, "colour"))
    if shape is None:
        return None
    return rng.choice((f"What shape is {shape.colour}?", f"Which shape is the {shape.colour} one?")), shape.name


def _beside(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    asked: list[tuple[Shape, str, list[Shape]]] = []
    for shape in scene.shapes:
        others = [s for s in scene.shapes if s is not shape]
        for side in SIDES:
            there = [s for s in others if is_beside(s, side, shape)]
            if len(there) <= 1 and not any(_in_line(s, side, shape) for s in others):
                asked.append((shape, side, there))
    full = [a for a in asked if a[2]]
    pick = _pick(rng, full if full and rng.random() < 0.8 else asked)
    if pick is None:
        return None
    shape, side, there = pick
    return f"What is {toward(side)} the {_look(shape)}?", a_look(there[0]) if there else "nothing"


def _relation(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    pairs = [
        (one, side, two)
        for one in scene.shapes
        for two in scene.shapes
        for side in SIDES
        if one is not two and not _in_line(one, side, two)
    ]
    wanted = rng.random() < 0.5
    pick = _pick(rng, [p for p in pairs if is_beside(*p) == wanted])
    if pick is None:
        return None
    one, side, two = pick
    return f"Is the {_look(one)} {toward(side)} the {_look(two)}?", "yes" if wanted else "no"


def _exists(scene: Scene, rng: random.Random) -> tuple[str, str]:
    looks = {(s.name, s.colour) for s in scene.shapes}
    wanted = rng.random() < 0.5
    absent = [(n, c) for n in SHAPES for c in COLOURS if (n, c) not in looks]
    # half of the absent ones share the colour or the shape of something that is there
    near = [(n, c) for n, c in absent if any(n == s.name or c == s.colour for s in scene.shapes)]
    name, colour = rng.choice(sorted(looks) if wanted else near if rng.random() < 0.5 else absent)
    return f"Is there {article(colour)} {name}?", "yes" if wanted else "no"


def _place(scene: Scene, rng: random.Random) -> tuple[str, str]:
    shape = rng.choice(scene.shapes)
    return f"Where is the {_look(shape)}?", PLACES[shape.row][shape.column]


def _describe(scene: Scene, rng: random.Random) -> tuple[str, str]:
    listed = join([a_look(s) for s in scene.shapes])
    verb, noun = ("is", "shape") if len(scene.shapes) == 1 else ("are", "shapes")
    question = rng.choice(("Describe the picture.", "What is in the picture?", "What do you see?"))
    return question, f"There {verb} {NUMBERS[len(scene.shapes)]} {noun}: {listed}."


def _describe_places(scene: Scene, rng: random.Random) -> tuple[str, str]:
    clauses = join([f"the {_look(s)} is {PLACES[s.row][s.column]}" for s in scene.shapes])
    question = rng.choice(("Where are the shapes?", "Say where each shape is."))
    return question, f"{clauses[0].upper()}{clauses[1:]}."


Maker = Callable[[Scene, random.Random], tuple[str, str] | None]
SHORT_KINDS: dict[str, Maker] = {
    "count": _count,
    "count_some": _count_some,
    "colour": _colour,
    "shape": _shape,
    "beside": _beside,
    "relation": _relation,
    "exists": _exists,
    "place": _place,
}
LONG_KINDS: dict[str, Maker] = {"describe": _describe, "describe_places": _describe_places}
KINDS: dict[str, Maker] = {**SHORT_KINDS, **LONG_KINDS}


def is_beside(one: Shape, side: str, two: Shape) -> bool:
    """Whether `one` stands on that side of `two`, by columns for left and right and by rows for above and below."""
    if side in ("left", "right"):
        return one.column < two.column if side == "left" else one.column > two.column
    return one.row < two.row if side == "above" else one.row > two.row


def _in_line(one: Shape, side: str, two: Shape) -> bool:
    return one.column == two.column if side in ("left", "right") else one.row == two.row


def toward(side: str) -> str:
    return f"to the {side} of" if side in ("left", "right") else side


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(name: str) -> str:
    return f"{name}es" if name.endswith("s") else f"{name}s"


def join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _look(shape: Shape) -> str:
    return f"{shape.colour} {shape.name}"


def a_look(shape: Shape) -> str:
    return article(_look(shape))


def _unique(shapes: Sequence[Shape], field: str) -> list[Shape]:
    counts = Counter(getattr(s, field) for s in shapes)
    return [s for s in shapes if counts[getattr(s, field)] == 1]


def _pick(rng: random.Random, items: Sequence[T]) -> T | None:
    return rng.choice(items) if items else None
