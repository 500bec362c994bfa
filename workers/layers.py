"""Sharded layers of a tensor-parallel model, their formulas, and how each fills itself from a checkpoint.

A layer owns its weight format: it allocates its parameters, computes with them, and loads them. `load` gets the
checkpoint names of the matrices fused in it, without the suffix `.weight` or `.bias`, and reads only this rank's
part of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dist_vlm.kernels.embed import embed_torch
from dist_vlm.kernels.linear import can_pack, linear, pack
from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.weights import WeightSource

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Embed = Callable[..., Tensor]


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a layer's parameters live: on which rank, in which dtype, on which device; and the ops that read them."""

    comm: Communicator
    dtype: torch.dtype
    device: torch.device
    linear: Linear = linear
    embed: Embed = embed_torch

    def empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)


def packed(weight: nn.Parameter) -> nn.Parameter:
    """A loaded weight in the form its products read fastest: itself where there is no other."""
    return nn.Parameter(pack(weight), requires_grad=False) if can_pack(weight) else weight


@dataclass(frozen=True, slots=True)
class Section:
    """The rows [start, stop) of a matrix with `size` rows: one rank's part."""

    size: int
    start: int
    stop: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def even_section(name: str, size: int, *, comm: Communicator, unit: int = 1) -> Section:
    """This rank's equal part of `size`; `ValueError` unless `size` divides into world_size parts of whole units."""
    if size % (comm.world_size * unit):
        raise ValueError(f"{name} is {size // unit}: not divisible by world_size {comm.world_size}")
    count = size // comm.world_size
    return Section(size, comm.rank * count, (comm.rank + 1) * count)


def kv_head_section(num_kv_heads: int, head_dim: int, *, comm: Communicator) -> Section:
    """This rank's rows of the key and value projections: an equal part of the heads, or, with fewer heads than
    ranks, one head that several ranks hold. `ValueError` where neither comes out even."""
    if num_kv_heads >= comm.world_size:
        return even_section("num_key_value_heads", num_kv_heads * head_dim, comm=comm, unit=head_dim)
    if comm.world_size % num_kv_heads:
        raise ValueError(f"num_key_value_heads is {num_kv_heads}: does not divide world_size {comm.world_size}")
    head = comm.rank * num_kv_heads // comm.world_size
    return Section(num_kv_heads * head_dim, head * head_dim, (head + 1) * head_dim)


def vocab_section(vocab_size: int, *, comm: Communicator) -> Section:
    """This rank's ids, `ceil(vocab_size / world_size)` of them; the last ranks' reach past the vocabulary."""
    count = -(-vocab_size // comm.world_size)
    return Section(vocab_size, comm.rank * count, (comm.rank + 1) * count)


class ColumnParallelLinear(nn.Module):
    """y = x W^T + b for this rank's rows of W, or of several matrices fused one after another.

    x: [T, in_features], whole -> [T, sum of the sections' counts].
    """

    def __init__(self, in_features: int, sections: Sequence[Section], *, bias: bool, place: Placement) -> None:
        super().__init__()
        self.sections = tuple(sections)
        rows = sum(section.count for section in self.sections)
        self.weight = place.empty(rows, in_features)
        self.bias = place.empty(rows) if bias else None
        self._linear = place.linear

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias)

    def load(self, source: WeightSource, names: Sequence[str]) -> None:
        start = 0
        for section, name in zip(self.sections, names, strict=True):
            rows, stop = slice(section.start, section.stop), start + section.count
            shape = (section.size, self.weight.shape[1])
            source.copy_into(self.weight[start:stop], f"{name}.weight", shape=shape, index=(rows,))
            if self.bias is not None:
                source.copy_into(self.bias[start:stop], f"{name}.bias", shape=(section.size,), index=(rows,))
            start = stop
        self.weight = packed(self.weight)


class RowParallelLinear(nn.Module):
    """This rank's term of y = x W^T + b: the sum over the ranks is the product, and whoever reads it must reduce.

    x: [T, columns of this rank] -> [T, out_features], a partial sum. Rank 0 alone holds and adds the bias.
    """

    def __init__(self, section: Section, out_features: int, *, bias: bool, place: Placement) -> None:
        super().__init__()
        self.section = section
        self.weight = place.empty(out_features, section.count)
        self.bias = place.empty(out_features) if bias and place.comm.rank == 0 else None
        self._has_bias = bias
        self._linear = place.linear

    def forward(self, x: Tensor) -> Tensor:
        return self._linear(x, self.weight, self.bias)

    def load(self, source: WeightSource, names: Sequence[str]) -> None:
        (name,) = names
        shape = (self.weight.shape[0], self.section.size)
        columns = slice(self.section.start, self.section.stop)
        source.copy_into(self.weight, f"{name}.weight", shape=shape, index=(slice(None), columns))
        self.weight = packed(self.weight)
        if self.bias is not None:
            source.copy_into(self.bias, f"{name}.bias", shape=tuple(self.bias.shape))
        elif self._has_bias:
            source.skip(f"{name}.bias")


class VocabParallelEmbedding(nn.Module):
    """This rank's rows of the embedding; ids of other ranks give zero rows, so that the ranks' sum is the embedding.

    ids: int64 [T] -> [T, hidden_size], a partial sum. feature_rows, features: see `dist_vlm.kernels.embed`; one rank
    alone is given the features.
    """

    def __init__(self, section: Section, hidden_size: int, *, place: Placement) -> None:
        super().__init__()
        self.section = section
        self.weight = place.empty(section.count, hidden_size)
        self._embed = place.embed

    def forward(self, ids: Tensor, feature_rows: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        return self._embed(ids, self.weight, first=self.section.start, feature_rows=feature_rows, features=features)

    def load(self, source: WeightSource, names: Sequence[str]) -> None:
        _load_vocabulary(self.weight, self.section, source, names)


class ParallelHead(nn.Module):
    """Logits of the whole vocabulary from the ranks' rows of the output embedding.

    x: [R, hidden_size], whole -> float32 [R, vocab_size], the same on every rank.
    tied: the embedding whose weight this head shares, or None.
    """

    def __init__(
        self, section: Section, hidden_size: int, *, tied: VocabParallelEmbedding | None, place: Placement
    ) -> None:
        super().__init__()
        self.section = section
        self.comm = place.comm
        self._linear = place.linear
        self.weight = tied.weight if tied is not None else place.empty(section.count, hidden_size)

    def forward(self, x: Tensor, *, out: Tensor | None = None) -> Tensor:
        if out is None:
            out = torch.empty((x.shape[0], self.section.size), dtype=torch.float32, device=x.device)
        return self.comm.gather_columns(self._linear(x, self.weight, None), out)

    def load(self, source: WeightSource, names: Sequence[str]) -> None:
        _load_vocabulary(self.weight, self.section, source, names)
        self.weight = packed(self.weight)


class NormWeight(nn.Module):
    """The weight of an RMSNorm, whole on every rank; the op that reduces applies it."""

    def __init__(self, hidden_size: int, *, place: Placement) -> None:
        super().__init__()
        self.weight = place.empty(hidden_size)

    def load(self, source: WeightSource, names: Sequence[str]) -> None:
        (name,) = names
        source.copy_into(self.weight, f"{name}.weight", shape=tuple(self.weight.shape))


def _load_vocabulary(weight: Tensor, section: Section, source: WeightSource, names: Sequence[str]) -> None:
    """Fills the rows of real ids and zeroes the padding past the vocabulary."""
    (name,) = names
    stop = max(section.start, min(section.stop, section.size))
    count = stop - section.start if section.start < section.size else 0
    start = min(section.start, section.size)
    source.copy_into(
        weight[:count], f"{name}.weight", shape=(section.size, weight.shape[1]), index=(slice(start, start + count),)
    )
    weight[count:].zero_()


class PackedLinear(nn.Module):
    """A loaded `nn.Linear` whose weight is in the form its product reads fastest."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.weight = weight
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def pack_linears(module: nn.Module) -> None:
    """Replaces the loaded `nn.Linear`s inside `module` whose weights have a faster form; they load no more."""
    names = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and can_pack(layer.weight)]
    for name in names:  # not the layers: each is to go once it is replaced, before the next is copied
        layer = cast(nn.Linear, module.get_submodule(name))
        module.set_submodule(name, PackedLinear(packed(cast(nn.Parameter, layer.weight)), layer.bias))
        del layer


def load_layers(module: nn.Module, table: Mapping[str, Sequence[str]], source: WeightSource) -> None:
    """Fills every layer of `module`. table: path of a layer -> checkpoint names of the matrices fused in it.

    Raises `RuntimeError` where the table leaves a parameter out, `CheckpointError` as `source` does.
    """
    for path, names in table.items():
        layer = module.get_submodule(path)
        layer.load(source, names)  # type: ignore[operator]
    owners = {name.rpartition(".")[0] for name, _ in module.named_parameters()}
    if left_out := sorted(owners - set(table)):
        raise RuntimeError(f"the table of checkpoint names leaves out: {', '.join(left_out)}")
