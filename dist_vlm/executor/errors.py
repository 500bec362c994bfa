"""What a failed call of a rank means, out of what Ray raises for it."""

from __future__ import annotations

import re

from dist_vlm.workers.failure import RankError, describe

# With which Ray begins to tell what it may have been.
_GUESSES = r" There are some potential root causes| Some common causes include"


def rank_error(error: BaseException) -> RankError | None:
    """The `RankError` that a call on a rank raised, if that is what `error` carries."""
    # Ray raises a class derived from both its own error and ours, whose `cause` is the original.
    for candidate in (getattr(error, "cause", None), error):
        if isinstance(candidate, RankError):
            return candidate
    return None


def is_death(error: BaseException) -> bool:
    """Whether the call failed because its process ended."""
    from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OwnerDiedError

    return isinstance(error, (ActorDiedError, ActorUnavailableError, NodeDiedError, OwnerDiedError))


def death_cause(error: BaseException) -> str:
    """One line out of Ray's account of a dead process."""
    text = str(error)
    if "creation task" in text:
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        return f"its process could not start: {lines[-1][:400]}"
    for pattern in (rf"Worker exit detail: (.*?)(?:{_GUESSES}|$)", r"because (.*)"):
        found = re.search(pattern, text, re.DOTALL)
        if found is not None:
            return "its process died: " + " ".join(found.group(1).split())[:400]
    return f"its process died: {describe(error)}"
