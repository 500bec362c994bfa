from __future__ import annotations

import random
import re

import numpy as np
import pytest

from examples.demo import questions
from examples.demo.dataset import held_out_examples, sample_split_scene, split_scans
from examples.demo.digits import Digit, load_scans
from examples.demo.questions import NUMBERS, PLACES
from examples.demo.rows import training_picture
from examples.demo.shapes import COLOURS, SHAPES, Scene, Shape, sample_scene

SEEDS = range(300)


def scenes() -> list[Scene]:
    return [sample_scene(random.Random(f"scene {seed}")) for seed in SEEDS]


def asked(kind: str) -> list[tuple[Scene, questions.QA]]:
    rng = random.Random(kind)
    found = [(scene, questions.ask(scene, kind, rng)) for scene in scenes()]
    return [(scene, qa) for scene, qa in found if qa is not None]


def look(scene: Scene, words: str) -> Shape:
    (shape,) = [s for s in scene.shapes if f"{s.colour} {s.name}" == words]
    return shape


def lies(one: Shape, side: str, two: Shape) -> bool:
    """By the centres' coordinates, which the questions do not look at."""
    return {"left": one.x < two.x, "right": one.x > two.x, "above": one.y < two.y, "below": one.y > two.y}[side]


def test_no_training_picture_is_held_out() -> None:
    trained = {training_picture(random.Random(f"train/0/{index}"))[0].key for index in range(4000)}
    held_out = {example.picture.key for seed in (0, 1) for example in held_out_examples(500, seed)}
    assert len(trained) > 3000
    assert len(held_out) > 800
    assert not trained & held_out


def test_the_held_out_pictures_are_all_different() -> None:
    examples = held_out_examples(500, 0)
    assert len({(example.picture, example.width, example.height) for example in examples}) == 500
    scans = [e.picture.key for e in examples if isinstance(e.picture, Digit)]
    assert len(scans) == len(set(scans)) == 100


def test_scans_are_split_without_a_rest() -> None:
    held_out, trained = split_scans(held_out=True), split_scans(held_out=False)
    assert len(held_out) + len(trained) == len(load_scans()) == 1797
    assert len(held_out) > 200
    assert not {scan for _, scan in held_out} & {scan for _, scan in trained}


def test_drawing_is_deterministic_and_depends_on_the_seed() -> None:
    first, again, other = (held_out_examples(10, seed) for seed in (0, 0, 1))
    assert [e.draw().tobytes() for e in first] == [e.draw().tobytes() for e in again]
    assert all(a.draw().tobytes() != b.draw().tobytes() for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(("width", "height"), [(90, 90), (200, 150), (150, 200)])
def test_every_shape_is_where_it_says_in_its_colour(width: int, height: int) -> None:
    for scene in scenes():
        pixels = np.asarray(scene.draw(width, height))
        assert pixels.shape == (height, width, 3)
        side = min(width, height)
        for shape in scene.shapes:
            column = int((width - side) / 2 + shape.x * side)
            row = int((height - side) / 2 + shape.y * side)
            assert tuple(pixels[row, column]) == shape.rgb
        assert tuple(pixels[0, 0]) == scene.background


def test_forms_differ_in_how_much_of_their_square_they_fill() -> None:
    areas: dict[str, list[float]] = {name: [] for name in SHAPES}
    for scene in scenes()[:60]:
        for shape in scene.shapes:
            drawn = np.asarray(Scene(shapes=(shape,), background=scene.background).draw(300, 300))
            inked = (drawn != scene.background).any(-1).sum()
            areas[shape.name].append(inked / (2 * 300 * shape.radius) ** 2)
    means = {name: np.mean(found) for name, found in areas.items()}
    assert sorted(means, key=lambda name: means[name]) == ["star", "triangle", "cross", "square", "circle"]
    assert means["circle"] == pytest.approx(np.pi / 4, abs=0.03)
    assert means["square"] == pytest.approx(0.86**2, abs=0.04)


def test_a_digit_is_drawn_as_its_scan() -> None:
    for scan in load_scans()[:20]:
        centred = Digit(scan[0], scan[1], (1.0, 1.0), (0.0, 0.0), 0.0, 0.0, 1.0, ink=(0,) * 3, paper=(255,) * 3)
        small = np.asarray(centred.draw(160, 160).convert("L")).reshape(8, 20, 8, 20).mean((1, 3))
        expected = 255 - np.frombuffer(scan[1], np.uint8).reshape(8, 8).astype(np.float32) * 255 / 16
        assert np.corrcoef(small.ravel(), expected.ravel())[0, 1] > 0.97


def test_counts() -> None:
    for scene, qa in asked("count"):
        assert qa.answer == NUMBERS[len(scene.shapes)]
    for scene, qa in asked("count_some"):
        words = re.findall(r"\w+", qa.question)
        singular = {"crosses": "cross", **{f"{name}s": name for name in SHAPES}}
        wanted = [s for s in scene.shapes if s.colour in words or s.name in {singular.get(w) for w in words}]
        assert qa.answer == NUMBERS[len(wanted)]


def test_colour_and_shape_are_asked_of_one_thing() -> None:
    for scene, qa in asked("colour"):
        (shape,) = [s for s in scene.shapes if s.name in qa.question]
        assert qa.answer == shape.colour
    for scene, qa in asked("shape"):
        (shape,) = [s for s in scene.shapes if s.colour in qa.question]
        assert qa.answer == shape.name


def test_sides_agree_with_the_coordinates() -> None:
    answers = set()
    for scene, qa in asked("relation"):
        match = re.fullmatch(
            r"Is the (\w+ \w+) (?:to the )?(left|right|above|below)(?: of)? the (\w+ \w+)\?", qa.question
        )
        assert match is not None
        one, side, two = match.groups()
        assert qa.answer == ("yes" if lies(look(scene, one), side, look(scene, two)) else "no")
        answers.add(qa.answer)
    assert answers == {"yes", "no"}


def test_what_stands_beside_agrees_with_the_coordinates() -> None:
    for scene, qa in asked("beside"):
        match = re.fullmatch(r"What is (?:to the )?(left|right|above|below)(?: of)? the (\w+ \w+)\?", qa.question)
        assert match is not None
        shape = look(scene, match[2])
        there = [s for s in scene.shapes if s is not shape and lies(s, match[1], shape)]
        assert (
            [qa.answer.split(" ", 1)[1]] == [f"{s.colour} {s.name}" for s in there] if there else qa.answer == "nothing"
        )


def test_places_are_thirds_of_the_picture() -> None:
    for scene, qa in asked("place"):
        shape = look(scene, " ".join(qa.question.rstrip("?").split()[-2:]))
        assert qa.answer == PLACES[int(3 * shape.y)][int(3 * shape.x)]


def test_a_description_names_every_shape_in_reading_order() -> None:
    for scene, qa in asked("describe"):
        named = re.findall(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b", qa.answer)
        by_row = sorted(scene.shapes, key=lambda s: (int(3 * s.y), s.x))
        assert named == [(s.colour, s.name) for s in by_row]


def test_a_split_scene_is_on_the_side_asked_for() -> None:
    rng = random.Random(0)
    sides = [{sample_split_scene(rng, held_out=side).key for _ in range(500)} for side in (True, False)]
    assert not sides[0] & sides[1]
