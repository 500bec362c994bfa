#!/usr/bin/env python3
"""transformers' `generate` on the workload, greedy, on the CPU.

    python run_hf.py --model DIR --n 16

seq: one request at a time; a streamer takes the time of each token. batch: padded batches of --batch-size, each
run to its longest answer; only the tokens that were asked for count.
"""

import argparse
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import workload


class TokenTimes:
    """A streamer of `generate` that keeps when each token came; it is handed the prompt first."""

    def __init__(self):
        self.times = []
        self._saw_prompt = False

    def put(self, _tokens):
        if self._saw_prompt:
            self.times.append(time.perf_counter())
        self._saw_prompt = True

    def end(self):
        pass


class Generator:
    """A loaded model: batches of requests in, new token ids and prompt lengths out."""

    def __init__(self, path, dtype):
        import torch
        from transformers import AutoProcessor, LlavaForConditionalGeneration

        self._torch = torch
        self._dtype = getattr(torch, dtype)
        self._model = LlavaForConditionalGeneration.from_pretrained(path, dtype=self._dtype).eval()
        self._processor = AutoProcessor.from_pretrained(path)
        self._processor.tokenizer.padding_side = "left"
        settings = self._model.generation_config
        settings.do_sample = False
        settings.eos_token_id = None  # no answer ends early
        settings.pad_token_id = self._processor.tokenizer.pad_token_id

    def run(self, requests, streamer=None):
        inputs = self._processor(
            images=[r.image for r in requests],
            text=[r.prompt for r in requests],
            padding=len(requests) > 1,
            return_tensors="pt",
        )
        inputs["pixel_values"] = inputs["pixel_values"].to(self._dtype)
        longest = max(r.max_tokens for r in requests)
        with self._torch.inference_mode():
            whole = self._model.generate(**inputs, max_new_tokens=longest, streamer=streamer)
        new = whole[:, inputs["input_ids"].shape[1] :].tolist()
        ids = [tokens[: r.max_tokens] for tokens, r in zip(new, requests, strict=True)]
        return ids, inputs["attention_mask"].sum(1).tolist()


def one_at_a_time(generator, requests):
    ids, lengths, ttft, tpot = [], [], [], []
    for request in requests:
        clock, began = TokenTimes(), time.perf_counter()
        tokens, prompt = generator.run([request], clock)
        ids += tokens
        lengths += prompt
        ttft.append(clock.times[0] - began)
        if len(clock.times) > 1:
            tpot.append((clock.times[-1] - clock.times[0]) / (len(clock.times) - 1))
    return ids, lengths, ttft, tpot


def in_batches(generator, requests, size):
    ids, lengths = [], []
    for first in range(0, len(requests), size):
        tokens, prompts = generator.run(requests[first : first + size])
        ids += tokens
        lengths += prompts
    return ids, lengths, [], []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    workload.add_args(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    if args.tp != 1:
        parser.error("--tp must be 1: transformers runs in one process here")
    began = time.perf_counter()
    import torch
    import transformers

    if args.threads:
        torch.set_num_threads(args.threads)
    generator = Generator(args.model, args.dtype)
    start_s = round(time.perf_counter() - began, 2)
    requests, warm = workload.load(args)
    for request in warm:
        generator.run([request])
    modes = {
        "seq": lambda: one_at_a_time(generator, requests),
        "batch": lambda: in_batches(generator, requests, args.batch_size),
    }
    workload.measure(
        f"transformers-{transformers.__version__}",
        modes,
        args,
        start_s=start_s,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


if __name__ == "__main__":
    main()
