"""How a rank says what went wrong: who, while doing what, and why, in one line."""

from __future__ import annotations

MAX_CAUSE_CHARS = 600


class RankError(RuntimeError):
    """Something failed on one rank.

    rank: the rank it happened on.
    stage: what the rank was doing: "import", "device", "join", "load", "allocate", "stage", "step", ...
    cause: one line.
    """

    def __init__(self, rank: int, stage: str, cause: str) -> None:
        # All three are `args`, so the error survives pickling by Ray.
        super().__init__(rank, stage, cause)
        self.rank, self.stage, self.cause = rank, stage, cause

    def __str__(self) -> str:
        return f"rank {self.rank}, {self.stage}: {self.cause}"


def describe(error: BaseException) -> str:
    """One line: the type of the error and its text, whitespace collapsed, cut at `MAX_CAUSE_CHARS`."""
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= MAX_CAUSE_CHARS else line[: MAX_CAUSE_CHARS - 3] + "..."
