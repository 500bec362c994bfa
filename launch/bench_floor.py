"""The least time that a device could need for a piece of work, from its measured rates and the model's shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_vlm.config import EngineConfig
    from dist_vlm.executor.base import ExecutorInfo
    from dist_vlm.launch.bench_rates import DeviceRates
    from dist_vlm.workers.models import ModelSpec

_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class Floor:
    """What one rank of a tensor-parallel group must move and compute at least.

    A decoder of gated MLPs is assumed, whose parameters are those of its matrix products:
        layers = num_layers * (2 * hidden * (num_heads + num_kv_heads) * head_dim + 3 * hidden * intermediate)
        head = hidden * vocab
    The embedding table is not among them: a step reads a few rows of it. Attention's own products, norms, collectives
    and all of the host's work are left out, so a floor is never reached.

    layer_parameters, head_parameters: this rank's part of both. kv_token_bytes: keys and values of one position.
    vision_parameters: the encoder and projector, whole on every rank. image_rows: positions of one image.
    image_share: part of the images that one rank encodes.
    """

    rates: DeviceRates
    item_bytes: int
    layer_parameters: float
    head_parameters: float
    kv_token_bytes: float
    vision_parameters: int
    image_rows: int
    image_share: float

    @classmethod
    def of(cls, config: EngineConfig, spec: ModelSpec, info: ExecutorInfo, rates: DeviceRates) -> Floor:
        """config: a resolved one. info: what its started executor told."""
        ranks, item_bytes = config.parallel.tensor_parallel_size, _ITEM_BYTES[config.model.dtype]
        attention = 2 * spec.hidden_size * (spec.num_heads + spec.num_kv_heads) * spec.head_dim
        layer = attention + 3 * spec.hidden_size * spec.intermediate_size
        kv_heads = max(1.0, spec.num_kv_heads / ranks)
        return cls(
            rates=rates,
            item_bytes=item_bytes,
            layer_parameters=spec.num_layers * layer / ranks,
            head_parameters=spec.hidden_size * spec.vocab_size / ranks,
            kv_token_bytes=2 * spec.num_layers * kv_heads * spec.head_dim * item_bytes,
            vision_parameters=info.reports[0].num_vision_parameters,
            image_rows=spec.image_feature_size or 0,
            image_share=1 / ranks if config.vision.vision_data_parallel else 1.0,
        )

    @property
    def language_bytes(self) -> float:
        """Weights that every decode step reads."""
        return (self.layer_parameters + self.head_parameters) * self.item_bytes

    def decode_step_s(self, batch: int, context: float) -> float:
        """One token for each of `batch` sequences that are `context` positions long on average:
        max(language_bytes / bandwidth, 2 * parameters * batch / FLOP/s) + batch * context * kv_token_bytes / bandwidth.
        """
        flop = 2 * (self.layer_parameters + self.head_parameters) * batch
        linears = max(self._move_s(self.language_bytes), self._compute_s(flop))
        return linears + self._move_s(batch * context * self.kv_token_bytes)

    def prefill_s(self, num_tokens: float, *, num_images: int = 1) -> float:
        """One prompt alone, to its first token: max(language_bytes / bandwidth,
        (2 * layers * tokens + 2 * head) / FLOP/s), and its images: 2 * vision_parameters * image_rows / FLOP/s each."""
        return max(self._move_s(self.language_bytes), self._prefill_compute_s(num_tokens)) + self._images_s(num_images)

    def throughput_s(self, num_requests: int, num_tokens: float, *, num_outputs: int, batch: int) -> float:
        """All of many requests of one image each, `num_tokens` positions of prompt and `num_outputs` tokens of answer,
        when their prefill fills the device's arithmetic and their decode runs in full batches, one after the other:

            requests * (prefill's FLOP / FLOP/s + images' FLOP / FLOP/s
                        + sum over the outputs - 1 decode steps of decode_step_s(batch, tokens + step) / batch)

        Only work of both kinds at the same time, or fewer bits, goes past it.
        """
        steps = num_outputs - 1
        mean_context = num_tokens + (steps + 1) / 2
        decode_s = steps * self.decode_step_s(batch, mean_context) / batch
        return num_requests * (self._prefill_compute_s(num_tokens) + self._images_s(1) + decode_s)

    def _prefill_compute_s(self, num_tokens: float) -> float:
        return self._compute_s(2 * self.layer_parameters * num_tokens + 2 * self.head_parameters)

    def _images_s(self, num_images: int) -> float:
        return self._compute_s(2 * self.vision_parameters * self.image_rows * num_images * self.image_share)

    def _move_s(self, num_bytes: float) -> float:
        return num_bytes / self.rates.copy_bytes_per_s

    def _compute_s(self, flop: float) -> float:
        return flop / self.rates.matmul_flop_per_s
