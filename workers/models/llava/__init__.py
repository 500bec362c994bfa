"""LLaVA-1.5: a CLIP tower, a projector, and a Llama language model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dist_vlm.workers.models.family import ImageProcessor, LanguageModel, ModelFamily, VisionModel
from dist_vlm.workers.models.llava import config as llava_config
from dist_vlm.workers.models.spec import CheckpointError, ModelSpec

if TYPE_CHECKING:
    import torch

    from dist_vlm.kernels.choice import OpSet
    from dist_vlm.workers.comm import Communicator
    from dist_vlm.workers.weights import WeightSource


class LlavaFamily(ModelFamily):
    def read_spec(self, path: str, config: dict[str, Any]) -> ModelSpec:
        return llava_config.read_spec(path, config)

    def preload(self) -> None:
        from dist_vlm.workers.models.llava import language, loading, vision  # noqa: F401

    def build_language(
        self, spec: ModelSpec, *, comm: Communicator, ops: OpSet, dtype: torch.dtype, device: torch.device
    ) -> LanguageModel:
        from dist_vlm.workers.models.llava.language import LlamaLanguageModel

        facts = llava_config.read_facts(spec.path).text
        is_default = facts.rope_type == "default"
        rope_config = facts if is_default else llava_config.transformers_config(spec.path).text_config
        try:
            return LlamaLanguageModel(facts, rope_config, comm=comm, ops=ops, dtype=dtype, device=device)
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{spec.path}/config.json: {error}") from error

    def build_vision(self, spec: ModelSpec, *, ops: OpSet, dtype: torch.dtype, device: torch.device) -> VisionModel:
        from dist_vlm.workers.models.llava.vision import ClipVisionModel

        facts = llava_config.read_facts(spec.path)
        return ClipVisionModel(facts.vision, facts.text.hidden_size, ops=ops, dtype=dtype, device=device)

    def load_language(self, model: LanguageModel, spec: ModelSpec, source: WeightSource) -> None:
        from dist_vlm.workers.models.llava.loading import load_language

        load_language(model.module, llava_config.read_facts(spec.path).text, source)

    def load_vision(self, model: VisionModel, spec: ModelSpec, source: WeightSource) -> None:
        from dist_vlm.workers.layers import pack_linears
        from dist_vlm.workers.models.llava.loading import load_vision

        load_vision(model.module, llava_config.read_facts(spec.path).vision, source)
        pack_linears(model.module)

    @property
    def chat_template(self) -> str:
        return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")

    def image_processor(self, spec: ModelSpec, path: str | None = None) -> ImageProcessor:
        from dist_vlm.workers.models.llava.processor import PilImageProcessor

        if spec.image_input_shape is None:
            raise CheckpointError(f"{spec.path} takes no images")
        return PilImageProcessor(spec.path if path is None else path, spec.image_input_shape)


FAMILY = LlavaFamily()
