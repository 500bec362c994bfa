"""Many large pictures at once, beside as many small ones: what they take, and what memory. Prints JSON.

    python benchmarks/large_pictures.py --config configs/demo.yaml
    python benchmarks/large_pictures.py --config configs/llava-1.5-7b-1gpu.yaml --model DIR --load-format dummy

All requests are given in one call, each with a JPEG file of its own, which the engine decodes. Each must be answered
in full. A picture that a caller has opened stays decoded for as long as the caller holds it: that is told by itself.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from server_process import gpu_memory

from dist_vlm import LLM
from dist_vlm.config import EngineConfig
from dist_vlm.config_load import add_config_flags, config_flags, load_config
from dist_vlm.launch.bench_engine import TimedEngine, check_pictures_fit
from dist_vlm.launch.bench_record import record
from dist_vlm.machine import usable_cores

PROMPT = "USER: <image>\nWhat is it? ASSISTANT:"
BLOCK = 32
QUALITY = 85
# Of a decoded RGB picture, as Pillow keeps it.
PIXEL_BYTES = 4
WARM_UP = 4


def file_of(number: int, side: int) -> bytes:
    """A square JPEG picture of coloured blocks, another for each number."""
    blocks = -(-side // BLOCK)
    noise = np.random.default_rng(number).integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)
    picture = Image.fromarray(noise).resize((blocks * BLOCK, blocks * BLOCK), Image.Resampling.NEAREST)
    file = io.BytesIO()
    picture.crop((0, 0, side, side)).save(file, "jpeg", quality=QUALITY)
    return file.getvalue()


def reset_peak() -> None:
    """Has the kernel count the peak of this process's resident memory from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def resident() -> tuple[int, int]:
    """Bytes of this process: now, and at most since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    now, most = (re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE) for name in ("VmRSS", "VmHWM"))
    assert now is not None and most is not None
    return 1024 * int(now[1]), 1024 * int(most[1])


def together(llm: LLM, numbers: Sequence[int], side: int, num_tokens: int) -> dict[str, Any]:
    """Pictures of one size, in one call. Raises `RuntimeError` for one that is not answered."""
    with ThreadPoolExecutor(usable_cores()) as threads:
        files = list(threads.map(lambda number: file_of(number, side), numbers))
    opened = [Image.open(io.BytesIO(file)) for file in files]
    requests = [{"prompt": PROMPT, "multi_modal_data": {"image": picture}} for picture in opened]
    before, _ = resident()
    reset_peak()
    timed = TimedEngine(llm).run(requests, num_tokens)
    _, most = resident()
    return {
        "side": side,
        "file_bytes": sum(map(len, files)),
        "seconds": round(timed.seconds, 3),
        "pictures_per_s": round(len(numbers) / timed.seconds, 2),
        "driver_peak_growth_bytes": most - before,
        "decoded_bytes_held_by_the_caller": PIXEL_BYTES * side * side * len(numbers),
        "preemptions": timed.books()["preemptions"],
    }


def measure(config: EngineConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    with LLM.from_config(config) as llm:
        count, num_tokens = arguments.pictures, arguments.output_tokens
        together(llm, range(2 * count, 2 * count + WARM_UP), arguments.small_side, num_tokens)
        before = gpu_memory()
        small = together(llm, range(count), arguments.small_side, num_tokens)
        large = together(llm, range(count, 2 * count), arguments.side, num_tokens)
        after = gpu_memory()
    grown = {name: after[name] - used for name, used in before.items()}
    slower = round(large["seconds"] / small["seconds"], 2)
    return {"small": small, "large": large, "slower_by": slower, "gpu_memory_growth_bytes": grown}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file; without it --model is needed")
    parser.add_argument("--pictures", type=int, default=64, help="at once")
    parser.add_argument("--side", type=int, default=4096, help="of the large ones, in pixels")
    parser.add_argument("--small-side", type=int, default=336)
    parser.add_argument("--output-tokens", type=int, default=8)
    parser.add_argument("--commit", help="in place of what git says")
    parser.add_argument("--out", type=Path, help="also write the JSON there")
    add_config_flags(parser)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    arguments = parse_arguments(words)
    config = load_config(arguments.config, config_flags(arguments)).resolve()
    check_pictures_fit(config, num_tokens=arguments.output_tokens)
    settings = {name: getattr(arguments, name) for name in ("pictures", "side", "small_side", "output_tokens")}
    facts = record("large_pictures", config, settings=settings, rates=None, commit=arguments.commit)
    text = json.dumps(facts | measure(config, arguments), indent=1)
    sys.stdout.write(text + "\n")
    if arguments.out is not None:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
