"""A program: runs `dist-vlm generate` on a file four times, killed with -9 each time at a chance moment, and then to
the end. Prints one JSON list: how each run ended, and how many whole answers there were then.

    python killed_runs.py SEED OUTPUT WORDS...      WORDS: of the command, without --resume

Runs are forks of this process, which has the imports already: a run that is to be killed costs no start.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch  # noqa: F401
import transformers  # noqa: F401

from dist_vlm.async_llm import AsyncLLM  # noqa: F401
from dist_vlm.config import EngineConfig, resolve
from dist_vlm.engine.front import load_front
from dist_vlm.executor.fake import FakeExecutor
from dist_vlm.launch import batch, cli, line_answers, line_pictures  # noqa: F401

# A file of 60 answers then takes a second or two.
STEP_S = 0.01


def run(words: list[str]) -> None:
    """In a child: ends the process."""
    sound = FakeExecutor.__init__

    def slow(self: FakeExecutor, **arguments: object) -> None:
        sound(self, **arguments, step_delay_s=STEP_S)  # type: ignore[arg-type]

    FakeExecutor.__init__ = slow  # type: ignore[method-assign]
    os._exit(cli.main(words))


def whole_answers(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def killed_after(child: int, output: Path, num_answers: int, delay_s: float) -> int:
    """Kills a run once there are so many answers, and a moment later. Returns how it ended."""
    while whole_answers(output) < num_answers:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.0005)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(seed: int, output: Path, words: list[str]) -> None:
    load_front(resolve(EngineConfig.from_fields(model=words[words.index("--model") + 1], device="cpu")))
    chance = random.Random(seed)
    # How many answers of its own each run gives before it is killed.
    own = [0, 3, 7, 13]
    chance.shuffle(own)
    ends: list[tuple[int, int]] = []
    for count in own:
        wanted = whole_answers(output) + count
        child = os.fork()
        if child == 0:
            run([*words, *["--resume"] * bool(ends)])
        status = killed_after(child, output, wanted, chance.uniform(0, 4 * STEP_S))
        ends.append((status, whole_answers(output)))
    child = os.fork()
    if child == 0:
        run([*words, "--resume"])
    ends.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), whole_answers(output)))
    print(json.dumps(ends))


if __name__ == "__main__":
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would be lost in the forks
    main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
