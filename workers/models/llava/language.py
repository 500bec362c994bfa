"""The Llama language model of a LLaVA checkpoint, one rank's shard of it.

The forward reads as on one device: where a product is split over the ranks, a layer returns its partial sum, and what
is yielded to `reduce_add_norm` is all that adds the ranks up. A forward makes 2 * num_layers all-reduces and one more
where rows are asked for, `logits` one all-gather.
Touvron et al., "LLaMA", 2023; Liu et al., "Visual Instruction Tuning", 2023.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dist_vlm.kernels.choice import OpSet
from dist_vlm.workers.batch import Batch
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.halves import Beside, Forward, Reduced, Reduction, run_in_halves, run_whole
from dist_vlm.workers.kv_cache import KVCache
from dist_vlm.workers.layers import (
    ColumnParallelLinear,
    NormWeight,
    ParallelHead,
    Placement,
    RowParallelLinear,
    VocabParallelEmbedding,
    even_section,
    kv_head_section,
    vocab_section,
)
from dist_vlm.workers.models.family import LanguageModel
from dist_vlm.workers.models.llava.config import TextFacts
from dist_vlm.workers.rotary import RotaryFrequencies


class DecoderLayer(nn.Module):
    """Attention and MLP of one layer; the projections out of both return partial sums."""

    def __init__(self, facts: TextFacts, place: Placement) -> None:
        super().__init__()
        hidden, head_dim, comm = facts.hidden_size, facts.head_dim, place.comm
        heads = even_section("num_attention_heads", facts.num_heads * head_dim, comm=comm, unit=head_dim)
        kv_heads = kv_head_section(facts.num_kv_heads, head_dim, comm=comm)
        middle = even_section("intermediate_size", facts.intermediate_size, comm=comm)
        self.input_norm = NormWeight(hidden, place=place)
        self.qkv = ColumnParallelLinear(hidden, (heads, kv_heads, kv_heads), bias=facts.attention_bias, place=place)
        self.attention_out = RowParallelLinear(heads, hidden, bias=facts.attention_bias, place=place)
        self.post_attention_norm = NormWeight(hidden, place=place)
        self.gate_up = ColumnParallelLinear(hidden, (middle, middle), bias=facts.mlp_bias, place=place)
        self.down = RowParallelLinear(middle, hidden, bias=facts.mlp_bias, place=place)
        self._num_heads, self._num_kv_heads = heads.count // head_dim, kv_heads.count // head_dim
        self._head_dim = head_dim

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, rows] -> queries [T, heads, D], keys and values [T, kv_heads, D], views."""
        heads = qkv.view(qkv.shape[0], -1, self._head_dim)
        q, k, v = heads.split([self._num_heads, self._num_kv_heads, self._num_kv_heads], dim=1)
        return q, k, v


class Shard(nn.Module):
    """One rank's parameters."""

    def __init__(self, facts: TextFacts, place: Placement) -> None:
        super().__init__()
        hidden, vocabulary = facts.hidden_size, vocab_section(facts.vocab_size, comm=place.comm)
        self.embedding = VocabParallelEmbedding(vocabulary, hidden, place=place)
        self.layers = nn.ModuleList(DecoderLayer(facts, place) for _ in range(facts.num_layers))
        self.norm = NormWeight(hidden, place=place)
        tied = self.embedding if facts.tied_head else None
        self.head = ParallelHead(vocabulary, hidden, tied=tied, place=place)

    def decoder_layers(self) -> Iterable[DecoderLayer]:
        return cast("Iterable[DecoderLayer]", self.layers)


class LlamaLanguageModel(LanguageModel):
    """See `LanguageModel`.

    rope_config: transformers' LlamaConfig of the same model; its rotary parameters are read.
    """

    def __init__(
        self,
        facts: TextFacts,
        rope_config: Any,
        *,
        comm: Communicator,
        ops: OpSet,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.facts = facts
        self.comm = comm
        self.ops = ops
        self.module = self.shard = Shard(facts, Placement(comm, dtype, device, ops.linear, ops.embed))
        self.rotary = RotaryFrequencies(rope_config, head_dim=facts.head_dim, dtype=dtype, device=device)
        self._scale = facts.head_dim**-0.5

    def expect_positions(self, num_positions: int) -> None:
        self.rotary.tabulate(num_positions)

    def forward(self, batch: Batch, kv_cache: KVCache) -> Tensor:
        return run_whole(self._forward(batch, kv_cache), self._reduce)

    def forward_in_halves(
        self, first: Batch, second: Batch, kv_cache: KVCache, beside: Beside
    ) -> tuple[Tensor, Tensor]:
        halves = self._forward(first, kv_cache), self._forward(second, kv_cache)
        return run_in_halves(*halves, self._reduce, beside)

    def _forward(self, batch: Batch, kv_cache: KVCache) -> Forward:
        cos, sin = self.rotary(batch.positions[0], batch.rotary_lengths)
        plan = self._plan_attention(batch, kv_cache)
        partial: Tensor = self._embed(batch)
        residual: Tensor | None = None
        rows, last = batch.logits_rows, self.shard.layers[-1]
        for index, layer in enumerate(self.shard.decoder_layers()):
            cache = (kv_cache.keys[index], kv_cache.values[index])
            normed, residual = yield Reduction(partial, residual, layer.input_norm.weight)
            q, k, v = layer.split_heads(layer.qkv(normed))
            attended = self.ops.attention(q, k, v, cos, sin, *cache, batch.slot_mapping, plan, scale=self._scale)
            if layer is last and rows is not None and rows.shape[0]:
                # From here on, only the rows asked for are computed: one of a prompt's hundreds.
                attended, residual = attended.index_select(0, rows), residual.index_select(0, rows)
            partial = layer.attention_out(attended.flatten(1))
            normed, residual = yield Reduction(partial, residual, layer.post_attention_norm.weight)
            partial = layer.down(self.ops.silu_mul(layer.gate_up(normed)))
        if rows is not None and not rows.shape[0]:
            return partial[:0]
        normed, _ = yield Reduction(partial, residual, self.shard.norm.weight)
        return normed

    def logits(self, hidden: Tensor, *, out: Tensor | None = None) -> Tensor:
        logits: Tensor = self.shard.head(hidden, out=out)
        return logits

    def _plan_attention(self, batch: Batch, kv_cache: KVCache) -> Any:
        keys, recorded = kv_cache.keys[0], self.ops.recorded
        if batch.decode_slots is not None:
            assert recorded is not None
            slots, contexts = batch.decode_slots, batch.context_lens
            return recorded.plan_decode(slots, contexts, batch.block_tables, block_size=keys.shape[1])
        if batch.tiles is not None:
            assert recorded is not None
            num_tokens = batch.token_ids.shape[0]
            return recorded.plan_tiles(batch.tiles, num_tokens, batch.block_tables, block_size=keys.shape[1])
        return self.ops.plan_attention(
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            block_size=keys.shape[1],
            position_bytes=2 * keys.shape[2] * keys.shape[3] * keys.element_size(),
            bounds=batch.bounds,
        )

    def _embed(self, batch: Batch) -> Tensor:
        """[T, hidden_size], partial: rank 0 alone puts the image features in, the others add zero there."""
        rows = batch.feature_rows
        features = batch.image_features if rows is not None and self.comm.rank == 0 else None
        partial: Tensor = self.shard.embedding(batch.token_ids, rows, features)
        return partial

    def _reduce(self, wanted: Reduction) -> Reduced:
        eps, op = self.facts.rms_norm_eps, self.ops.reduce_add_norm
        return self.comm.reduce_add_norm(wanted.partial, wanted.residual, wanted.norm, eps=eps, op=op)
