from __future__ import annotations

import pytest

from dist_vlm.executor.errors import death_cause

# As Ray 2.60 words them, shortened in the middle.
DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: Worker
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. {guesses}"""
GUESSES = {
    "older": "There are some potential root causes. (1) The process is killed by SIGKILL by OOM killer",
    "newer": "Some common causes include: (1) the process was killed by the OOM killer due to high",
    "none": "",
}
SHORT = "its process died: Worker unexpectedly exits with a connection error code 2. End of file."


@pytest.mark.parametrize("guesses", GUESSES.values(), ids=GUESSES.keys())
def test_a_death_is_told_without_rays_guesses(guesses: str) -> None:
    assert death_cause(RuntimeError(DIED.format(guesses=guesses))) == SHORT


def test_what_ray_gives_as_a_reason_is_told() -> None:
    error = RuntimeError("The actor died because its node has died.\n  Node Id: 7")
    assert death_cause(error) == "its process died: its node has died. Node Id: 7"


def test_a_process_that_could_not_start_is_told_by_its_last_line() -> None:
    text = "The actor died because of an error raised in its creation task, ray::__init__()\n  File x\nKeyError: 'y'\n"
    assert death_cause(RuntimeError(text)) == "its process could not start: KeyError: 'y'"
