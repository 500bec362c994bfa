"""Trains the demo checkpoint from nothing.

    python -m examples.demo.train --out examples/demo/checkpoint

The last step's weights are kept, rounded to bfloat16. Held-out pictures are only looked at for the printed lines, and
they are other ones than those `evaluate` asks about.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from transformers import LlavaForConditionalGeneration

from examples.demo import checkpoint
from examples.demo.checkpoint import IMAGE_MEAN, IMAGE_STD, Sizes
from examples.demo.dataset import held_out_examples
from examples.demo.figures import FOLDER, code_commit, environment, update_figures
from examples.demo.packing import IGNORE, Packer, attention_mask, position_ids, target_weights
from examples.demo.rows import Rows, Source, held_out_rows, training_rows
from examples.demo.tokenizer import train_tokenizer


@dataclass(frozen=True)
class Settings:
    out: Path
    figures: Path = FOLDER / "figures.json"
    seed: int = 0
    steps: int = 7000
    batch: int = 192
    pictures: int = 240_000
    learning_rate: float = 1.5e-3
    warm_up: int = 300
    weight_decay: float = 0.05
    held_out: int = 500
    report_every: int = 500
    processes: int = os.cpu_count() or 1
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    compile: bool = False
    commit: str = field(default_factory=code_commit)
    sizes: Sizes = field(default_factory=Sizes)


class Trainer:
    """The model, its optimizer, and the rows on the device."""

    def __init__(self, settings: Settings, rows: Rows, prefix: list[int]) -> None:
        self.settings = settings
        self.device = torch.device(settings.device)
        self.rows = [torch.from_numpy(part).to(self.device) for part in (rows.pictures, rows.tokens, rows.targets)]
        self.prefix = torch.tensor(prefix, device=self.device)[None]
        self.positions = position_ids(len(prefix)).to(self.device)
        self.mask = attention_mask(len(prefix)).to(self.device)
        self.weights = target_weights().to(self.device)
        self.mean, self.std = (torch.tensor(x, device=self.device)[:, None, None] for x in (IMAGE_MEAN, IMAGE_STD))
        self.model = torch.nn.Module.to(checkpoint.new_model(settings.out, settings.seed), self.device)
        if settings.compile:
            compile_layers(self.model)
        self.optimizer = _optimizer(self.model, settings)
        self.generator = torch.Generator().manual_seed(settings.seed)

    def logits(self, pictures: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """[rows, tokens of the slots, vocabulary] for pictures uint8 [rows, side, side, 3] and tokens int16."""
        pixels = (pictures.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        count = len(tokens)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(
                input_ids=torch.cat([self.prefix.expand(count, -1), tokens.long()], dim=1),
                pixel_values=pixels,
                attention_mask=self.mask,
                position_ids=self.positions.expand(count, -1),
                use_cache=False,
                logits_to_keep=tokens.shape[1],
            ).logits

    def step(self, number: int) -> torch.Tensor:
        """One update, on rows drawn at random; returns the loss before it."""
        picked = torch.randint(len(self.rows[0]), (self.settings.batch,), generator=self.generator)
        pictures, tokens, targets = (part[picked.to(self.device)] for part in self.rows)
        scores = self.logits(pictures, tokens).float().transpose(1, 2)
        each = F.cross_entropy(scores, targets.long(), ignore_index=IGNORE, reduction="none")
        loss = (each * self.weights).sum() / (self.weights * (targets != IGNORE)).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.settings, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    @torch.no_grad()
    def right(self, rows: Rows, batch: int = 125) -> np.ndarray:
        """bool [rows]: whether the best token is the right one at every place of the row's answers."""
        found = []
        for start in range(0, len(rows.tokens), batch):
            parts = (torch.from_numpy(p[start : start + batch]) for p in (rows.pictures, rows.tokens, rows.targets))
            pictures, tokens, targets = (part.to(self.device) for part in parts)
            with torch.compiler.set_stance("force_eager"):
                best = self.logits(pictures, tokens).argmax(-1)
            found.append(((best == targets) | (targets == IGNORE)).all(1).cpu().numpy())
        return np.concatenate(found)


def compile_layers(model: LlavaForConditionalGeneration) -> None:
    """Compiles the layers one by one, all alike, so that two of them are compiled in all and not the whole model."""
    for layer in [*model.model.language_model.layers, *_vision_layers(model)]:
        layer.compile()


def _vision_layers(model: LlavaForConditionalGeneration) -> torch.nn.ModuleList:
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).encoder.layers


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a half cosine down to zero."""
    if step < settings.warm_up:
        return settings.learning_rate * (step + 1) / settings.warm_up
    done = (step - settings.warm_up) / max(1, settings.steps - settings.warm_up)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _optimizer(model: LlavaForConditionalGeneration, settings: Settings) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=(0.9, 0.98), fused=settings.device.startswith("cuda")
    )


def train(settings: Settings, say: Callable[[str], None] = print) -> list[float]:
    """Writes the checkpoint to `settings.out` and returns the loss of each step."""
    started = time.perf_counter()
    tokenizer = train_tokenizer()
    checkpoint.write_files(settings.out, tokenizer, settings.sizes)
    sizes = settings.sizes
    source = Source(settings.seed, settings.out, sizes.vision.image_size, sizes.num_image_tokens)
    rows = training_rows(source, settings.pictures, processes=settings.processes)
    examples = held_out_examples(settings.held_out, settings.seed + 1)
    held_out = held_out_rows(source, examples)
    kinds = np.array([e.qa.kind for e in examples])
    drawn = time.perf_counter()
    say(f"{settings.pictures} pictures drawn in {drawn - started:.1f} s")

    trainer = Trainer(settings, rows, Packer(tokenizer, sizes.num_image_tokens).prefix())
    losses = []
    for number in range(settings.steps):
        losses.append(trainer.step(number))
        if (number + 1) % settings.report_every == 0 or number + 1 == settings.steps:
            mean = torch.stack(losses[-settings.report_every :]).mean().item()
            spent = time.perf_counter() - drawn
            say(f"step {number + 1}  {spent:.0f} s  loss {mean:.4f}  {_by_kind(trainer.right(held_out), kinds)}")
            checkpoint.save_weights(trainer.model, settings.out)
    trained = time.perf_counter()
    _write_figures(settings, trainer, drawing=drawn - started, training=trained - drawn)
    return torch.stack(losses).tolist()


def _by_kind(right: np.ndarray, kinds: np.ndarray) -> str:
    parts = [f"{kind} {right[kinds == kind].mean():.2f}" for kind in dict.fromkeys(kinds)]
    return f"right {right.mean():.3f} ({', '.join(parts)})"


def _write_figures(settings: Settings, trainer: Trainer, *, drawing: float, training: float) -> None:
    shown = ("seed", "steps", "batch", "pictures", "learning_rate", "warm_up", "weight_decay", "compile")
    update_figures(
        settings.figures,
        ("training",),
        {
            "parameters": sum(p.numel() for p in trainer.model.parameters()),
            **{name: getattr(settings, name) for name in shown},
            "drawing_seconds": round(drawing, 1),
            "training_seconds": round(training, 1),
            **environment(settings.device, settings.commit),
        },
    )


def main(arguments: list[str]) -> None:
    defaults = Settings(out=Path())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder the checkpoint is written to")
    parser.add_argument("--figures", type=Path, default=defaults.figures)
    for name in ("seed", "steps", "batch", "pictures", "processes", "device", "commit"):
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--compile", action="store_true", help="compile the layers (GPU)")
    train(Settings(**vars(parser.parse_args(arguments))))


if __name__ == "__main__":
    main(sys.argv[1:])
