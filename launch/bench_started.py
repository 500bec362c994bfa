"""The process that `dist-vlm bench startup` starts: python -m dist_vlm.launch.bench_started JOB RESULT.

JOB: a JSON file with the fields of the configuration and the settings. RESULT: where the moments go, or the error.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.launch.bench_engine import check_output, greedy
from dist_vlm.launch.bench_workload import request, requests

if TYPE_CHECKING:
    from dist_vlm import AsyncLLM
    from dist_vlm.inputs import TextPrompt


async def moments(job: dict[str, Any]) -> dict[str, Any]:
    """The fields of `dist_vlm.launch.bench_startup.Started`."""
    from dist_vlm import AsyncLLM, EngineConfig

    chosen = job["settings"]
    async with AsyncLLM.from_config(EngineConfig.from_fields(**job["config"])) as llm:
        ready = time.monotonic()
        first = await _news(llm, request(0), num_tokens=chosen["output_tokens"])
        # Made before they are given: making a picture takes time that is none of the engine's.
        prompts = requests(range(1, 1 + chosen["requests"]))
        news = await _answer_all(llm, prompts, in_flight=chosen["in_flight"], num_tokens=chosen["output_tokens"])
        return {
            "ready": ready,
            "first_token": first[0],
            "first_ended": first[-1],
            "news": news,
            "num_tokens": len(prompts) * chosen["output_tokens"],
            "stages": llm.executor_info.start_seconds,
        }


async def _answer_all(llm: AsyncLLM, prompts: Sequence[TextPrompt], *, in_flight: int, num_tokens: int) -> list[float]:
    """The moment before the first request is given, then those of all news, in order."""
    waiting = iter(prompts)

    async def one_after_another() -> list[float]:
        return [moment for prompt in waiting for moment in await _news(llm, prompt, num_tokens=num_tokens)]

    began = time.monotonic()
    found = await asyncio.gather(*(one_after_another() for _ in range(in_flight)))
    return [began, *sorted(moment for some in found for moment in some)]


async def _news(llm: AsyncLLM, prompt: TextPrompt, *, num_tokens: int) -> list[float]:
    """Answers one request. The moments of its news; the first one is its first token's."""
    found = []
    async for output in llm.generate(prompt, greedy(num_tokens)):
        found.append(time.monotonic())
        if output.finished:
            check_output(output, num_tokens)
    return found


def main(words: Sequence[str]) -> int:
    job, result = map(Path, words)
    status, found = 0, {}
    try:
        found = asyncio.run(moments(json.loads(job.read_text(encoding="utf-8"))))
    except (ValueError, RuntimeError, OSError) as error:
        status, found = 1, {"error": str(error) or type(error).__name__}
    result.write_text(json.dumps(found), encoding="utf-8")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
