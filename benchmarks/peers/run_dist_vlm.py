#!/usr/bin/env python3
"""This runtime's offline `LLM` on the workload, greedy, on the CPU.

    python run_dist_vlm.py --model DIR --n 16 --executor inline
    python run_dist_vlm.py --model DIR --n 16 --tp 2 --transport direct

seq: one request at a time, its times taken as its tokens come. batch: all requests in one call.
"""

import argparse
import inspect
import time

import workload


def engine_options(args):
    """Caches that would spare a second pass over a picture are off, as with the other engines."""
    from dist_vlm.config import RULES

    options = {
        "tensor_parallel_size": args.tp,
        "executor": args.executor,
        "transport": args.transport,
        "device": "cpu",
        "dtype": args.dtype,
        "max_model_len": 2048,
        "kv_cache_memory_gib": args.kv_gib,
        "enable_prefix_caching": False,
        "feature_cache_tokens": 0,
    }
    if args.threads:
        options["threads_per_rank"] = args.threads
    return {name: value for name, value in options.items() if name in RULES}


class Generator:
    def __init__(self, args):
        from dist_vlm import LLM, SamplingParams

        self._params = SamplingParams
        self._llm = LLM(args.model, **engine_options(args))

    def _asked(self, requests):
        prompts = [{"prompt": r.prompt, "multi_modal_data": {"image": r.image}} for r in requests]
        return prompts, [self._params(temperature=0.0, max_tokens=r.max_tokens, ignore_eos=True) for r in requests]

    def stream(self, request):
        """Yields when a token came, with the output so far."""
        ((prompt,), (params,)) = self._asked([request])
        for output in self._llm.stream(prompt, params):
            yield time.perf_counter(), output

    def run(self, requests):
        return self._llm.generate(*self._asked(requests), use_tqdm=False)

    def shutdown(self):
        self._llm.shutdown()


def facts(outputs):
    return [list(output.outputs[0].token_ids) for output in outputs], [len(out.prompt_token_ids) for out in outputs]


def one_at_a_time(generator, requests):
    outputs, ttft, tpot = [], [], []
    for request in requests:
        began = time.perf_counter()
        arrived = list(generator.stream(request))
        first, last = arrived[0][0], arrived[-1][0]
        outputs.append(arrived[-1][1])
        ttft.append(first - began)
        if len(arrived) > 1:
            tpot.append((last - first) / (len(arrived) - 1))
    return *facts(outputs), ttft, tpot


def all_at_once(generator, requests):
    outputs = generator.run(requests)
    times = [output.metrics for output in outputs]
    ids, lengths = facts(outputs)
    ttft = [t.first_token_time - t.arrival_time for t in times]
    tpot = [(t.last_token_time - t.first_token_time) / (len(i) - 1) for t, i in zip(times, ids, strict=True)]
    return ids, lengths, ttft, tpot


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_args(parser)
    parser.add_argument("--executor", choices=("inline", "ray"), default="ray")
    parser.add_argument("--transport", choices=("ray", "direct"), default="direct")
    parser.add_argument("--kv-gib", type=float, default=1.0)
    args = parser.parse_args()
    began = time.perf_counter()
    import dist_vlm

    generator = Generator(args)
    start_s = round(time.perf_counter() - began, 2)
    requests, warm = workload.load(args)
    for request in warm:
        generator.run([request])
    modes = {"seq": lambda: one_at_a_time(generator, requests), "batch": lambda: all_at_once(generator, requests)}
    workload.measure(
        f"dist-vlm-{dist_vlm.__version__}",
        modes,
        args,
        start_s=start_s,
        executor=args.executor,
        transport=args.transport if args.executor == "ray" else None,
        package=inspect.getfile(dist_vlm),
    )
    generator.shutdown()


if __name__ == "__main__":
    main()
