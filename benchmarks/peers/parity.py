#!/usr/bin/env python3
"""Compare the greedy token ids that two runners saved.

    python parity.py hf.json vllm.json
    python parity.py hf.json vllm.json --model DIR   # judge each divergence

With --model, HF recomputes in float32 the logits at each first divergence:
`gap` is how far the two chosen tokens' logits are apart there (in logit units;
the logits' standard deviation is printed beside it). A small gap is rounding;
a large one is a wrong computation. Exit status 1 if any request differs.
"""

import argparse
import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("a")
    ap.add_argument("b")
    ap.add_argument("--model")
    args = ap.parse_args()
    A, B = (json.load(open(p)) for p in (args.a, args.b))
    for k in ("n", "seed", "out_len", "out_vary"):
        if A[k] != B[k]:
            raise SystemExit(f"different workloads: {k} {A[k]} and {B[k]}")
    exact, same, total, div = 0, 0, 0, []
    for i, (x, y) in enumerate(zip(A["token_ids"], B["token_ids"])):
        k = next((j for j, (p, q) in enumerate(zip(x, y)) if p != q), min(len(x), len(y)))
        total += len(x)
        same += k
        if k == len(x) == len(y):
            exact += 1
        else:
            div.append((i, k))
    out = {
        "a": A["engine"],
        "b": B["engine"],
        "n": A["n"],
        "exact_requests": exact,
        "tokens_before_divergence": same,
        "tokens": total,
        "prompt_lens_equal": A["prompt_lens"] == B["prompt_lens"],
        "first_divergence": div,
    }
    if args.model and div:
        out["gaps"] = gaps(args.model, A, B, div)
    print(json.dumps(out))
    sys.exit(bool(div))


def gaps(path, A, B, div):
    import torch
    import workload
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    proc = AutoProcessor.from_pretrained(path)
    reqs = workload.requests(A["n"], A["out_len"], A["out_vary"], A["seed"])
    res = []
    for i, k in div:
        x, y = A["token_ids"][i], B["token_ids"][i]
        if k >= min(len(x), len(y)):
            res.append({"request": i, "at": k, "why": "length"})
            continue
        inp = proc(images=[reqs[i].image], text=[reqs[i].prompt], return_tensors="pt")
        inp["input_ids"] = torch.cat([inp["input_ids"], torch.tensor([x[:k]], dtype=torch.long)], 1)
        inp["attention_mask"] = torch.ones_like(inp["input_ids"])
        with torch.inference_mode():
            logits = model(**inp, logits_to_keep=1).logits[0, -1]
        ranks = [int((logits > logits[token]).sum()) for token in (x[k], y[k])]
        gap = abs(float(logits[x[k]] - logits[y[k]]))
        spread = float(logits[3:32000].std())
        res.append({"request": i, "at": k, "gap": round(gap, 4), "ranks": ranks, "logit_std": round(spread, 3)})
    return res


if __name__ == "__main__":
    main()
