#!/usr/bin/env python3
"""One deterministic VLM workload for every engine: image + text in, greedy out.

`requests(n)` gives the same requests on every machine: images of several sizes
(seeded noise under seeded shapes), questions of 6 to 96 words, and output
lengths (`out_len`, or varied by `out_vary`). Run it to look at the workload.
"""

import base64
import dataclasses
import io
import json
import random

SIZES = [(224, 224), (336, 336), (320, 240), (480, 640), (500, 375), (640, 480), (160, 96), (800, 600)]
WORDS = (
    "the a of in near under between image picture object shape colour red green blue yellow round square "
    "line corner left right top bottom centre large small many few what which how where describe count "
    "compare explain list name please briefly carefully each every and or but with without pattern edge "
    "light dark noise region background foreground please answer step by step question scene detail "
    "relation position texture figure number size order first second last"
).split()


@dataclasses.dataclass
class Request:
    id: int
    image: object  # PIL.Image.Image, RGB
    question: str
    max_tokens: int

    @property
    def prompt(self):
        """The LLaVA-1.5 prompt, with one <image> placeholder and no BOS."""
        return f"USER: <image>\n{self.question} ASSISTANT:"

    def png_data_url(self):
        buf = io.BytesIO()
        self.image.save(buf, "PNG")
        return "data:image/png;base64," + base64.b64encode(buf.getvalue()).decode()

    def chat_messages(self):
        """The same request in OpenAI chat form; the chat template gives `prompt`."""
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": self.png_data_url()}},
                    {"type": "text", "text": self.question},
                ],
            }
        ]


def make_image(rng, size):
    from PIL import Image, ImageDraw

    w, h = size
    # coarse noise, upscaled, plus fine noise, so that crops and scales differ
    cw, ch = max(2, w // 32), max(2, h // 32)
    img = Image.frombytes("RGB", (cw, ch), rng.randbytes(cw * ch * 3)).resize(size, Image.BILINEAR)
    fine = Image.frombytes("RGB", size, rng.randbytes(w * h * 3))
    img = Image.blend(img, fine, 0.15)
    draw = ImageDraw.Draw(img)
    for _ in range(rng.randint(3, 9)):
        x0, x1 = sorted(rng.randrange(w) for _ in range(2))
        y0, y1 = sorted(rng.randrange(h) for _ in range(2))
        colour = tuple(rng.randrange(256) for _ in range(3))
        kind = rng.choice(("rectangle", "ellipse", "line"))
        if kind == "line":
            draw.line((x0, y0, x1, y1), fill=colour, width=rng.randint(1, 8))
        else:
            getattr(draw, kind)((x0, y0, x1, y1), fill=colour)
    return img


def requests(n, out_len=32, out_vary=0.0, seed=0):
    """out_vary=0.5 draws output lengths from [out_len/2, out_len]."""
    reqs = []
    for i in range(n):
        rng = random.Random(seed * 1_000_003 + i)
        image = make_image(rng, SIZES[i % len(SIZES)])
        words = [rng.choice(WORDS) for _ in range(rng.randint(6, 96))]
        low = max(1, round(out_len * (1 - out_vary)))
        reqs.append(Request(i, image, " ".join(words) + "?", rng.randint(low, out_len)))
    return reqs


# ------------------------------------------------- shared by the runners
def add_args(ap):
    ap.add_argument("--model", required=True)
    ap.add_argument("--n", type=int, default=16)
    ap.add_argument("--out", help="JSON file for the greedy token ids of each request")
    ap.add_argument("--dtype", default="bfloat16")
    ap.add_argument("--tp", type=int, default=1)
    ap.add_argument("--out-len", type=int, default=32)
    ap.add_argument("--out-vary", type=float, default=0.0)
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--warmup", type=int, default=2, help="requests of another seed run first")
    ap.add_argument("--threads", type=int, help="of each rank (none: the engine's own choice)")
    ap.add_argument("--modes", default="seq,batch", help="seq: one at a time; batch: all together")
    ap.add_argument("--rounds", type=int, default=1, help="times the workload is measured, per mode")


def load(a):
    reqs = requests(a.n, a.out_len, a.out_vary, a.seed)
    warm = requests(a.warmup, a.out_len, 0.0, a.seed + 77)
    return reqs, warm


def descendants(pid):
    """Live children of a process, their children, and so on."""
    import os

    try:
        kids = []
        for t in os.listdir(f"/proc/{pid}/task"):
            kids += open(f"/proc/{pid}/task/{t}/children").read().split()
        for k in kids:
            yield k
            yield from descendants(k)
    except OSError:
        return


def cpu_seconds():
    """Processor time that this process and its live descendants have used: what a busy machine does not stretch."""
    import os

    ticks = 0
    for pid in (str(os.getpid()), *descendants(os.getpid())):
        try:
            fields = open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def peak_rss_mb():
    """Peak RSS of this process plus the peak RSS of each live or ended child."""
    import os
    import resource

    def hwm(pid):
        try:
            for line in open(f"/proc/{pid}/status"):
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) / 1024
        except OSError:
            pass
        return 0.0

    own = hwm(os.getpid()) or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    kids = [hwm(k) for k in descendants(os.getpid())]
    return round(own + sum(kids), 1)


def mean(xs):
    xs = [x for x in xs if x is not None]
    return sum(xs) / len(xs) if xs else None


def report(engine, mode, n, wall, tokens, ttft, tpot, prompt_tokens=None, **extra):
    """Print one JSON line. tokens: output tokens asked for and delivered."""
    r = {
        "engine": engine,
        "mode": mode,
        "n": n,
        "wall_s": round(wall, 3),
        "requests_per_s": round(n / wall, 4),
        "output_tokens_per_s": round(tokens / wall, 3),
        "output_tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "mean_ttft_ms": ms(mean(ttft)),
        "mean_tpot_ms": ms(mean(tpot)),
        "peak_rss_mb": peak_rss_mb(),
        **extra,
    }
    print(json.dumps(r), flush=True)
    return r


def ms(x):
    return None if x is None else round(x * 1000, 2)


def measure(engine, modes, a, **extra):
    """Runs each mode asked for `a.rounds` times and reports it; saves the tokens of the first mode.

    modes: name -> a call that answers (token ids, prompt lengths, times to first token, times per token), each a
    list with an entry a request, the times in seconds.
    """
    import time

    kept = None
    for rnd in range(a.rounds):
        for mode in a.modes.split(","):
            began, cpu = time.perf_counter(), cpu_seconds()
            ids, lengths, ttft, tpot = modes[mode]()
            wall, cpu = time.perf_counter() - began, cpu_seconds() - cpu
            kept = kept or (ids, lengths)
            same = sum(x == y for x, y in zip(kept[0], ids, strict=True))
            tokens = sum(map(len, ids))
            facts = {"round": rnd, "cpu_s": round(cpu, 2), "dtype": a.dtype, "tp": a.tp, "same_as_first": same, **extra}
            report(engine, mode, len(ids), wall, tokens, ttft, tpot, sum(lengths), **facts)
    save(a.out, engine, a.model, a, *kept)


def save(path, engine, model, a, ids, prompt_ids=None):
    if not path:
        return
    with open(path, "w") as f:
        json.dump(
            {
                "engine": engine,
                "model": model,
                "dtype": a.dtype,
                "n": a.n,
                "seed": a.seed,
                "out_len": a.out_len,
                "out_vary": a.out_vary,
                "token_ids": ids,
                "prompt_lens": prompt_ids,
            },
            f,
        )
        f.write("\n")


def main():
    import argparse
    import hashlib

    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--n", type=int, default=16)
    ap.add_argument("--out-len", type=int, default=32)
    ap.add_argument("--out-vary", type=float, default=0.0)
    ap.add_argument("--png", help="write each image to this folder")
    a = ap.parse_args()
    for r in requests(a.n, a.out_len, a.out_vary):
        digest = hashlib.sha256(r.image.tobytes()).hexdigest()[:12]
        print(r.id, r.image.size, digest, len(r.question.split()), "words,", r.max_tokens, "tokens:", r.question[:60])
        if a.png:
            import os

            os.makedirs(a.png, exist_ok=True)
            r.image.save(os.path.join(a.png, f"{r.id}.png"))


if __name__ == "__main__":
    main()
