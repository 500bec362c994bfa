"""Fills the modules of a LLaVA model from a checkpoint, by the tables of `weight_names`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from dist_vlm.workers.layers import load_layers
from dist_vlm.workers.models.llava import weight_names
from dist_vlm.workers.models.llava.config import TextFacts, VisionFacts
from dist_vlm.workers.models.spec import CheckpointError
from dist_vlm.workers.weights import WeightSource


def load_language(module: nn.Module, facts: TextFacts, source: WeightSource) -> None:
    """Reads this rank's slices. `CheckpointError` for a missing, misshapen or unknown tensor."""
    prefix = weight_names.find_prefix(source, weight_names.LANGUAGE_PREFIXES, "embed_tokens.weight")
    head = None
    if not facts.tied_head:
        head = weight_names.find_prefix(source, weight_names.HEAD_PREFIXES, "lm_head.weight") + "lm_head"
    table = weight_names.language_table(facts.num_layers, prefix=prefix, head=head)
    load_layers(module, table, source)
    _refuse_unknown([name for name in source.unasked(prefix) if not weight_names.is_buffer(name)])


def load_vision(module: nn.Module, facts: VisionFacts, source: WeightSource) -> None:
    """Reads the tower's needed layers and the projector, whole."""
    tower = weight_names.find_prefix(source, weight_names.VISION_PREFIXES, "embeddings.class_embedding")
    projector = weight_names.find_prefix(source, weight_names.PROJECTOR_PREFIXES, "linear_1.weight")
    prefixes = {"clip": tower, "projector": projector}
    for path, parameter in module.named_parameters():
        component, _, name = path.partition(".")
        names = weight_names.vision_names(name)
        for part, part_name in zip(parameter.chunk(len(names)), names, strict=True):
            source.copy_into(part, prefixes[component] + part_name, shape=tuple(part.shape))
    unknown = source.unasked(projector)
    for full_name in source.unasked(tower):
        if not weight_names.vision_ignored(full_name.removeprefix(tower), facts.num_needed_layers):
            unknown.append(full_name)
    _refuse_unknown(unknown)


def _refuse_unknown(names: Sequence[str]) -> None:
    if names:
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise CheckpointError(f"the checkpoint has tensors that the model does not know: {shown}")
