"""What a model family offers to the rest of the runtime."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from dist_vlm.workers.models.spec import ModelSpec

if TYPE_CHECKING:
    from concurrent.futures import Executor

    import numpy as np
    import torch
    from PIL import Image
    from torch import nn

    from dist_vlm.kernels.choice import OpSet
    from dist_vlm.workers.batch import Batch
    from dist_vlm.workers.comm import Communicator
    from dist_vlm.workers.halves import Beside
    from dist_vlm.workers.kv_cache import KVCache
    from dist_vlm.workers.weights import WeightSource


class LanguageModel(ABC):
    """One rank's shard of a language model."""

    module: nn.Module

    def expect_positions(self, num_positions: int) -> None:  # noqa: B027
        """Told once, before the first forward: every position will be below `num_positions`."""

    @abstractmethod
    def forward(self, batch: Batch, kv_cache: KVCache) -> torch.Tensor:
        """Writes the batch's keys and values and returns the normed last hidden states of `batch.logits_rows`,
        [R, hidden_size], reduced: the same on every rank. Waits for no device."""

    @abstractmethod
    def forward_in_halves(
        self, first: Batch, second: Batch, kv_cache: KVCache, beside: Beside
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`forward` of both, one computed while the other's parts are added up; see `dist_vlm.workers.halves`. A
        sequence's tokens may lie in both, the earlier ones in `first`."""

    @abstractmethod
    def logits(self, hidden: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of `forward`'s result [R, hidden_size] -> float32 [R, vocab_size], gathered: the same on every rank.

        out: filled and returned instead of a new tensor.
        """


class VisionModel(ABC):
    """A vision encoder with its projector, whole on every rank."""

    module: nn.Module

    @abstractmethod
    def encode_pixels(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, channels, height, width] -> [images, image_feature_size, hidden_size]."""

    @abstractmethod
    def project_features(self, features: torch.Tensor) -> torch.Tensor:
        """Vision-tower output [images, rows, image_feature_width] -> [images, rows, hidden_size]."""


class ImageProcessor(ABC):
    """The host's half of a family: pictures to pixel tensors. Runs in the driver, and in processes without torch."""

    @abstractmethod
    def preprocess(self, image: Image.Image, *, helpers: Executor | None = None) -> np.ndarray:
        """One RGB picture -> float32 pixel values, shape `image_input_shape`, or the same as coded pixels (uint8).

        helpers: threads that may take parts of the work, as `run_beside` says.
        """

    @property
    @abstractmethod
    def digest(self) -> str:
        """Names the processor's settings; part of an image's content key."""


class ModelFamily(ABC):
    """Heavy imports (torch, transformers) belong inside the methods: the driver reads specs without them."""

    @abstractmethod
    def read_spec(self, path: str, config: dict[str, Any]) -> ModelSpec:
        """Checks `config` (the parsed config.json of `path`) and returns its facts; `CheckpointError` otherwise."""

    @abstractmethod
    def preload(self) -> None:
        """Imports what building and loading need: seconds, and memory that is no part of the weights'."""

    @abstractmethod
    def build_language(
        self, spec: ModelSpec, *, comm: Communicator, ops: OpSet, dtype: torch.dtype, device: torch.device
    ) -> LanguageModel:
        """An uninitialised shard for `comm.rank` of `comm.world_size`. Its parameters are allocated, not filled."""

    @abstractmethod
    def build_vision(self, spec: ModelSpec, *, ops: OpSet, dtype: torch.dtype, device: torch.device) -> VisionModel:
        """An uninitialised vision encoder and projector."""

    @abstractmethod
    def load_language(self, model: LanguageModel, spec: ModelSpec, source: WeightSource) -> None:
        """Fills the shard from the checkpoint, reading only this rank's slices."""

    @abstractmethod
    def load_vision(self, model: VisionModel, spec: ModelSpec, source: WeightSource) -> None:
        """Fills the vision encoder and projector."""

    @property
    def chat_template(self) -> str | None:
        """Jinja, for checkpoints of the family that bring no chat template; None where there is no usual one."""
        return None

    @abstractmethod
    def image_processor(self, spec: ModelSpec, path: str | None = None) -> ImageProcessor:
        """The checkpoint's image processor, PIL backend; `path` names another directory to read it from."""
