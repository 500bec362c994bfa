"""What becomes of requests, processes and memory when one rank is killed with -9 amid traffic, and how long it takes
until there are answers again, of this engine or of a new one. Prints JSON.

    python benchmarks/rank_loss.py --config configs/demo.yaml --rank 1
    python benchmarks/rank_loss.py --config configs/llava-1.5-7b-8gpu.yaml --model DIR --load-format dummy

The traffic is that of `dist-vlm bench`: questions about pictures, so many at any time, and no new ones after the kill.
All times are from the kill.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from server_process import gpu_memory

from dist_vlm import AsyncLLM
from dist_vlm.config import ConfigError, EngineConfig
from dist_vlm.config_load import add_config_flags, config_flags, load_config
from dist_vlm.engine.rank_config import executor_for
from dist_vlm.executor.base import ExecutorError
from dist_vlm.executor.ray import RayExecutor
from dist_vlm.launch.bench_engine import check_pictures_fit, greedy
from dist_vlm.launch.bench_flags import whole
from dist_vlm.launch.bench_record import record
from dist_vlm.launch.bench_workload import WARM_UP, request

# What processes may take to be gone once the engine is shut down.
GONE_S = 10.0
# Until all requests that were in work have ended; none should get here.
ENDED_S = 300.0
POLL_S = 0.01


@dataclass(frozen=True, slots=True)
class End:
    """Of a request. at: `time.monotonic()`. cause: why there is no whole answer."""

    at: float
    num_tokens: int
    cause: str = ""


@dataclass
class Traffic:
    """So many requests at any time, until `is_over` is set. news: when any of them had a new token."""

    llm: AsyncLLM
    output_tokens: int
    ends: list[End] = field(default_factory=list)
    news: list[float] = field(default_factory=list)
    num_begun: int = 0
    is_over: bool = False

    async def run(self, in_flight: int) -> None:
        numbers = itertools.count()
        await asyncio.gather(*(self._one_after_another(numbers) for _ in range(in_flight)))

    async def _one_after_another(self, numbers: Iterator[int]) -> None:
        while True:
            prompt = await asyncio.to_thread(request, next(numbers))
            if self.is_over:
                return
            self.num_begun += 1
            self.ends.append(await self._answered(prompt))

    async def _answered(self, prompt: Any) -> End:
        num_tokens, cause = 0, ""
        try:
            async for output in self.llm.generate(prompt, greedy(self.output_tokens)):
                num_tokens, cause = len(output.outputs[0].token_ids), output.error or ""
                if not cause:
                    self.news.append(time.monotonic())
        except ExecutorError as error:
            cause = str(error)
        return End(time.monotonic(), num_tokens, cause)


def rank_pids(executor: RayExecutor) -> list[int]:
    import ray

    calls = [actor.ping.options(concurrency_group="status").remote() for actor in executor._actors]
    found: list[int] = ray.get(calls, timeout=60)
    return found


def parents() -> dict[int, int]:
    """Each process that runs, one that waits to be reaped not counted, and who started it."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with suppress(OSError):
                state, parent = Path(f"/proc/{name}/stat").read_text(errors="replace").rpartition(")")[2].split()[:2]
                if state != "Z":
                    found[int(name)] = int(parent)
    return found


def descendants(pid: int) -> list[int]:
    table, found = parents(), [pid]
    for one in found:
        found += [child for child, parent in table.items() if parent == one]
    return found[1:]


def shared_memory_of(pids: Iterable[int]) -> set[str]:
    """Names in /dev/shm that any of them has mapped or open."""
    targets = []
    for pid in pids:
        with suppress(OSError):
            targets += [line.split(maxsplit=5)[-1] for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
            targets += [os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
    names = {target.removeprefix("/dev/shm/") for target in targets if target.startswith("/dev/shm/")}
    return {name for name in names if not name.endswith(" (deleted)")}


def left_of(pids: Sequence[int], limit_s: float) -> list[str]:
    """The commands of those that still run after so long."""
    end = time.monotonic() + limit_s
    left = list(pids)
    while left and time.monotonic() < end:
        time.sleep(POLL_S)
        running = parents()
        left = [pid for pid in left if pid in running]
    commands = []
    for pid in left:
        with suppress(OSError):  # it may end now
            commands.append(Path(f"/proc/{pid}/cmdline").read_text(errors="replace").replace("\0", " ").strip()[:120])
    return commands


async def first_token_s(config: EngineConfig) -> dict[str, float]:
    """Of a new engine: seconds until it is ready, and until the first token of a request with a picture."""
    began = time.monotonic()
    async with AsyncLLM.from_config(config) as llm:
        ready_s = time.monotonic() - began
        async for _ in llm.generate(request(WARM_UP), greedy(1)):
            return {"ready_s": round(ready_s, 3), "first_token_s": round(time.monotonic() - began, 3)}
    raise RuntimeError("the new engine gave no token")


async def measure(config: EngineConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    executor, gpus = executor_for(config), gpu_memory()
    assert isinstance(executor, RayExecutor)
    llm = AsyncLLM.from_config(config, executor=executor)
    try:
        ranks = rank_pids(executor)
        traffic = Traffic(llm, arguments.output_tokens)
        running = asyncio.create_task(traffic.run(arguments.in_flight))
        ending = asyncio.create_task(moment_of_end(llm))
        await asyncio.sleep(arguments.after_s)
        if ending.done() or running.done() or not traffic.news:
            raise RuntimeError(f"there is no traffic to kill a rank in: {traffic.ends or 'no token yet'}")
        pids = descendants(os.getpid())
        shared = shared_memory_of(pids)
        traffic.is_over = True
        in_work = traffic.num_begun - len(traffic.ends)
        killed = time.monotonic()
        os.kill(ranks[arguments.rank], signal.SIGKILL)
        await asyncio.wait_for(running, ENDED_S)
        dead = llm.dead_error
        known = await ending if dead is not None else None
        ending.cancel()
        ranks_left = await asyncio.to_thread(left_of, ranks, GONE_S)
        pids += descendants(os.getpid())  # those that took the others' place
        shared |= shared_memory_of(pids)
    finally:
        began = time.monotonic()
        await asyncio.to_thread(llm.shutdown)
        shutdown_s = time.monotonic() - began
    left = await asyncio.to_thread(left_of, pids, GONE_S)
    shared_left = sorted(name for name in shared if Path("/dev/shm", name).exists())
    gpus_left = {name: used - gpus[name] for name, used in gpu_memory().items()}
    told = outcome(traffic, rank=arguments.rank, killed=killed, in_work=in_work, dead=dead, known=known)
    told["met"]["nothing is left"] = not (ranks_left or left or shared_left)
    return told | {
        "held_before": {"processes": len(pids), "shared_memory": len(shared)},
        "left": {
            "killed_ranks": ranks_left,
            "after_shutdown": left,
            "shared_memory": shared_left,
            "gpu_bytes": gpus_left,
        },
        "shutdown_s": round(shutdown_s, 3),
        "new_engine": await first_token_s(config),
    }


def outcome(
    traffic: Traffic, *, rank: int, killed: float, in_work: int, dead: ExecutorError | None, known: float | None
) -> dict[str, Any]:
    """What became of the engine and of the requests. killed, known: when the rank was, and when the engine's end was
    told. in_work: requests at the kill. dead: None where the engine went on."""
    after = [end for end in traffic.ends if end.at >= killed]
    failed = [end for end in after if end.cause]
    if dead is None:
        met = {"no request failed": not failed}
    else:
        named = dead.rank == rank and all(f"rank {rank}" in end.cause for end in failed)
        met = {"the killed rank is named to everyone": named}
    return {
        "killed_rank": rank,
        "requests_in_work": in_work,
        "engine": "went on" if dead is None else "ended",
        "error": None if dead is None else str(dead),
        "ms_from_the_kill": {
            "first_request_failed": ms(min((end.at for end in failed), default=None), killed),
            "engine_ended": ms(known, killed),
            "tokens_again": None if failed else ms(again(traffic.news, killed), killed),
            "last_request_ended": ms(max((end.at for end in after), default=None), killed),
        },
        "requests": {
            "finished_before": len(traffic.ends) - len(after),
            "finished_after": len(after) - len(failed),
            "failed": len(failed),
            "failed_with_tokens": sum(end.num_tokens > 0 for end in failed),
            "causes": dict(Counter(end.cause for end in failed).most_common(5)),
        },
        "met": met | {"every request ended": in_work == len(after)},
    }


async def moment_of_end(llm: AsyncLLM) -> float:
    await llm.wait_dead()
    return time.monotonic()


def again(news: Sequence[float], killed: float) -> float | None:
    """The moment of the news that ended the longest silence after the kill. What was on its way then still came."""
    before = max((moment for moment in news if moment <= killed), default=killed)
    moments = [before, *sorted(moment for moment in news if moment > killed)]
    return max(pairwise(moments), key=lambda pair: pair[1] - pair[0])[1] if len(moments) > 1 else None


def ms(moment: float | None, killed: float) -> float | None:
    return None if moment is None else round(1e3 * (moment - killed), 1)


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file; without it --model is needed")
    parser.add_argument("--rank", type=whole(0), default=1, help="the one that is killed")
    parser.add_argument("--after-s", type=whole(1), default=5, help="seconds of traffic before that")
    parser.add_argument("--in-flight", type=whole(1), default=16, help="requests at any time")
    parser.add_argument("--output-tokens", type=whole(1), default=128)
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    add_config_flags(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    config = load_config(arguments.config, config_flags(arguments)).resolve()
    if config.parallel.executor != "ray":
        raise ConfigError("must be ray", field="parallel.executor", value=config.parallel.executor)
    if not 0 <= arguments.rank < config.parallel.tensor_parallel_size:
        problem = f"must be a rank, below tensor_parallel_size, which is {config.parallel.tensor_parallel_size}"
        raise ConfigError(problem, field="rank", value=arguments.rank, source="--rank")
    check_pictures_fit(config, num_tokens=arguments.output_tokens)
    settings = {name: getattr(arguments, name) for name in ("rank", "after_s", "in_flight", "output_tokens")}
    facts = record("rank_loss", config, settings=settings, rates=None, commit=arguments.commit)
    text = json.dumps(facts | asyncio.run(measure(config, arguments)), indent=1)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
