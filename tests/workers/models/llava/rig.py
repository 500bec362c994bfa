"""Random checkpoints as transformers writes them, and a model driven through a shuffled block table."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dist_vlm.kernels.choice import choose
from dist_vlm.workers.batch import Batch
from dist_vlm.workers.kv_cache import KVCache
from dist_vlm.workers.models import get_family, read_spec
from dist_vlm.workers.models.family import LanguageModel
from dist_vlm.workers.models.spec import ModelSpec
from dist_vlm.workers.safetensors_source import SafetensorsSource

from ...thread_comm import ThreadComm, on_ranks, thread_comms

IMAGE_ID = 90
CPU = torch.device("cpu")
OPS = choose("torch", CPU)


def llava_config(*, vision: dict[str, Any] | None = None, llava: dict[str, Any] | None = None, **text: Any) -> Any:
    text_config = LlamaConfig(
        **{
            "vocab_size": 99,
            "hidden_size": 48,
            "intermediate_size": 56,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            **text,
        }
    )
    vision_config = CLIPVisionConfig(
        **{
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            **(vision or {}),
        }
    )
    fields = {"image_token_index": IMAGE_ID, "image_seq_length": 4, **(llava or {})}
    return LlavaConfig(vision_config=vision_config, text_config=text_config, **fields)


def random_model(config: Any, *, seed: int = 0) -> Any:
    """transformers' model in float32, with weights large enough that attention picks positions."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            parameter.normal_(std=1.4 / parameter.shape[1:].numel() ** 0.5)
        elif name.endswith("bias"):
            parameter.normal_(std=0.1)
        else:
            parameter.normal_(mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3 if parameter.dim() == 1 else 1.0)
    return model


@dataclass
class Ranks:
    """The shards of one model, each with its cache."""

    spec: ModelSpec
    comms: list[ThreadComm]
    models: list[LanguageModel]
    block_size: int
    num_blocks: int
    caches: list[KVCache] = field(default_factory=list)

    def forward(self, batch: Batch) -> list[Tensor]:
        def logits(rank: int) -> Tensor:
            model = self.models[rank]
            hidden = model.forward(batch, self.caches[rank])
            if hidden.shape[0]:
                return model.logits(hidden)
            return torch.empty((0, self.spec.vocab_size), dtype=torch.float32, device=hidden.device)

        return on_ranks(self.comms, logits)


def build_ranks(
    path: Path,
    *,
    world_size: int = 1,
    kernels: str = "torch",
    block_size: int = 8,
    num_blocks: int = 64,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> Ranks:
    spec, comms = read_spec(str(path)), thread_comms(world_size)
    family = get_family(spec.family)

    def build(rank: int) -> LanguageModel:
        ops = choose(kernels, device)
        model = family.build_language(spec, comm=comms[rank], ops=ops, dtype=dtype, device=device)
        with SafetensorsSource(path) as source:
            family.load_language(model, spec, source)
        return model

    ranks = Ranks(spec, comms, on_ranks(comms, build), block_size, num_blocks)
    for _ in range(world_size):
        ranks.caches.append(
            KVCache.allocate(
                num_layers=spec.num_layers,
                num_blocks=num_blocks,
                block_size=block_size,
                num_kv_heads=max(1, spec.num_kv_heads // world_size),
                head_dim=spec.head_dim,
                dtype=dtype,
                device=device,
            )
        )
    return ranks


@dataclass
class PagedSequence:
    """A sequence and its shuffled blocks. features: rows for its image tokens, in order."""

    tokens: list[int]
    num_prompt_tokens: int
    blocks: list[int]
    features: Tensor | None = None


class Driver:
    """Packs chunks of sequences into batches, as a rank does, with blocks in shuffled order."""

    def __init__(self, ranks: Ranks, *, seed: int = 0) -> None:
        self.ranks = ranks
        self._free = list(range(ranks.num_blocks))
        random.Random(seed).shuffle(self._free)

    def sequence(self, tokens: Sequence[int], *, room: int = 0, features: Tensor | None = None) -> PagedSequence:
        num_blocks = -(-(len(tokens) + room) // self.ranks.block_size)
        blocks = [self._free.pop() for _ in range(num_blocks)]
        return PagedSequence(list(tokens), len(tokens), blocks, features)

    def batch(self, chunks: Sequence[tuple[PagedSequence, int, int]], rows: Sequence[int] | None = None) -> Batch:
        """chunks: (sequence, first position, end). rows: tokens whose logits are wanted; None for all."""
        size = self.ranks.block_size
        tokens, positions, lengths, slots, feature_rows, features = [], [], [], [], [], []
        starts, contexts = [0], []
        for sequence, start, end in chunks:
            for position in range(start, end):
                token = sequence.tokens[position]
                feature_rows.append(-1)
                if token == IMAGE_ID and sequence.features is not None:
                    feature_rows[-1] = len(features)
                    features.append(sequence.features[sequence.tokens[:position].count(IMAGE_ID)])
                tokens.append(token)
                positions.append(position)
                lengths.append(max(sequence.num_prompt_tokens, position + 1))
                slots.append(sequence.blocks[position // size] * size + position % size)
            starts.append(len(tokens))
            contexts.append(end)
        width = max(len(sequence.blocks) for sequence, _, _ in chunks)
        tables = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _, _ in chunks]
        keys = self.ranks.caches[0].keys[0]
        no_features = torch.empty(0, self.ranks.spec.hidden_size)

        def put(values: Any) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=keys.device)

        return Batch(
            token_ids=put(tokens),
            positions=put([positions]),
            rotary_lengths=put(lengths),
            slot_mapping=put(slots),
            query_starts=put(starts),
            context_lens=put(contexts),
            block_tables=put(tables),
            logits_rows=put(list(range(len(tokens)) if rows is None else rows)),
            feature_rows=put(feature_rows) if features else None,
            image_features=(torch.stack(features) if features else no_features).to(keys.device, keys.dtype),
            bounds=list(zip(starts[:-1], starts[1:], contexts, strict=True)),
        )

    def run(self, chunks: Sequence[tuple[PagedSequence, int, int]], rows: Sequence[int] | None = None) -> Tensor:
        """Logits of rank 0, after checking that the others have the same."""
        logits = self.ranks.forward(self.batch(chunks, rows))
        for other in logits[1:]:
            assert torch.equal(other, logits[0])
        return logits[0]


def random_tokens(count: int, *, seed: int = 0, vocab_size: int = 99) -> list[int]:
    draw = random.Random(seed)
    return [token if token != IMAGE_ID else 1 for token in (draw.randrange(vocab_size) for _ in range(count))]
