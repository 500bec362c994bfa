"""A rank's images: staged arrays, and the features they were encoded to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_vlm.workers.comm import Communicator
from dist_vlm.workers.encoder import FAILURE_REASONS, NOT_ENCODED, NOT_FINITE, Encoded, ImageEncoder, StagedImage
from dist_vlm.workers.models.family import VisionModel
from dist_vlm.workers.plan import ImageFailure

_log = logging.getLogger(__name__)


class ImageStore:
    """Staged arrays by content key. Staging runs beside the steps, in another thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: dict[str, tuple[str, np.ndarray]] = {}

    def stage(self, key: str, kind: str, array: np.ndarray) -> None:
        with self._lock:
            self._images[key] = (kind, array)

    def unstage(self, key: str) -> None:
        with self._lock:
            self._images.pop(key, None)

    def get(self, key: str) -> tuple[str, np.ndarray]:
        with self._lock:
            return self._images[key]


@dataclass(frozen=True, slots=True)
class FiniteCheck:
    """Whether encoded features are finite, which the device still computes.

    features: of each image, by its content key. finite: bool [images], in their order.
    """

    features: dict[str, torch.Tensor]
    finite: torch.Tensor

    def to_host(self) -> FiniteCheck:
        """Enqueues the copy; what is returned may be read once the device has come to here."""
        return FiniteCheck(self.features, self.finite.to("cpu", non_blocking=True))

    def guilty(self) -> dict[str, torch.Tensor]:
        """Features that are not finite."""
        return {
            key: features
            for (key, features), is_finite in zip(self.features.items(), self.finite.tolist(), strict=True)
            if not is_finite
        }


class FeatureStore:
    """Encoded images by content key: tensors [rows, hidden_size], the same on every rank.

    batch_images: images that go through the encoder at once, at most.
    data_parallel: whether the images of a call are split over the ranks; each then encodes its share and gets the
        others' features, to the bit. Otherwise, and for a single image, each rank encodes by itself.
    checks_later: whether features that are not finite are found by `take_check` and `fail`, once the device has come so
        far, and not by `encode`, which would wait for it. Ranks that have to agree on failures cannot.
    """

    def __init__(
        self,
        *,
        vision: VisionModel,
        comm: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        hidden_size: int,
        batch_images: int,
        data_parallel: bool,
        checks_later: bool = False,
    ) -> None:
        if checks_later and comm.world_size > 1:
            raise ValueError(f"checks_later with world_size = {comm.world_size}: must be one rank")
        self.encoder = ImageEncoder(vision=vision, dtype=dtype, device=device, batch_images=batch_images)
        self.comm = comm
        self.dtype = dtype
        self.device = device
        self.hidden_size = hidden_size
        self.data_parallel = data_parallel
        self.features: dict[str, torch.Tensor] = {}
        self._checks_later = checks_later
        self._unchecked: dict[str, torch.Tensor] = {}

    @property
    def num_encoded(self) -> int:
        """Images that this rank's encoder has encoded since the start."""
        return self.encoder.num_encoded

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.features.pop(key, None)  # one that failed was never held; the driver may not know yet

    def take_check(self) -> FiniteCheck | None:
        """Of the images encoded since it was last called; None where there are none."""
        unchecked, self._unchecked = self._unchecked, {}
        if not unchecked:
            return None
        features = {key: self.features[key] for key in unchecked}
        return FiniteCheck(features, torch.stack(list(unchecked.values())))

    def fail(self, check: FiniteCheck) -> tuple[ImageFailure, ...]:
        """Drops what a check that has arrived found guilty."""
        guilty = check.guilty()
        for key, features in guilty.items():
            _log.warning("image %s: its features are not finite numbers", key)
            if self.features.get(key) is features:
                del self.features[key]
        return tuple(ImageFailure(key, NOT_FINITE) for key in guilty)

    def encode(self, keys: Sequence[str], images: ImageStore) -> tuple[ImageFailure, ...]:
        """Encodes staged images and returns those that failed on any rank, the same list on every rank.

        One all-reduce, in which the ranks tell their failures before anything depends on them, and where images are
        split one all-gather of their features: a failure keeps no rank from either.
        """
        if not keys:
            return ()
        ranks = self.comm.world_size
        split = self.data_parallel and ranks > 1 and len(keys) > 1
        mine = keys[self.comm.rank :: ranks] if split else keys
        done = self._encode_here(mine, images)
        reasons, num_rows = self._agree(keys, done)
        for key in keys:
            self.features.pop(key, None)
        good = {key: rows for key, rows, reason in zip(keys, num_rows, reasons, strict=True) if reason is None}
        if split and good:
            self.features.update(self._gather(keys, good, done))
        else:
            self.features.update({key: done.features[key] for key in good})
        if self._checks_later:
            self._unchecked.update({key: done.finite[key] for key in good})
        return tuple(ImageFailure(key, reason) for key, reason in zip(keys, reasons, strict=True) if reason is not None)

    def _encode_here(self, keys: Sequence[str], images: ImageStore) -> Encoded:
        staged, missing = [], {}
        for key in keys:
            try:
                staged.append(StagedImage(key, *images.get(key)))
            except KeyError:
                _log.error("image %s is to be encoded, but is not staged", key)
                missing[key] = NOT_ENCODED
        done = self.encoder.encode(staged, is_checked=not self._checks_later)
        done.failed.update(missing)
        return done

    def _agree(self, keys: Sequence[str], done: Encoded) -> tuple[list[str | None], list[int]]:
        """For each image why it failed, None if it did on no rank, and its number of feature rows.

        Votes are float32 [1 + reasons, images]: a one at a failure's reason, and rows where they are known. Where all
        ranks encode an image, they add up to a multiple of its rows, which is then not read.
        """
        votes = torch.zeros(1 + len(FAILURE_REASONS), len(keys))
        for column, key in enumerate(keys):
            if key in done.failed:
                votes[1 + FAILURE_REASONS.index(done.failed[key]), column] = 1
            elif key in done.features:
                votes[0, column] = done.features[key].shape[0]
        if self.comm.world_size > 1:
            votes = votes.to(self.device)  # alone, the GPU has nothing to add
        rows, *failed = self.comm.all_reduce(votes).tolist()
        reasons = [
            next((reason for reason, votes in zip(FAILURE_REASONS, column, strict=True) if votes), None)
            for column in zip(*failed, strict=True)
        ]
        return reasons, [int(count) for count in rows]

    def _gather(self, keys: Sequence[str], good: dict[str, int], done: Encoded) -> dict[str, torch.Tensor]:
        """All ranks' features. Image i is the (i // ranks)-th of rank i % ranks; shorter shares and images are padded
        with zeros, and so are failed ones."""
        ranks = self.comm.world_size
        share = torch.zeros(
            (-(-len(keys) // ranks), max(good.values()), self.hidden_size), dtype=self.dtype, device=self.device
        )
        for place, key in enumerate(keys[self.comm.rank :: ranks]):
            if key in good:
                share[place, : good[key]] = done.features.pop(key)
        gathered = self.comm.all_gather(share)
        return {
            key: gathered[index % ranks, index // ranks, : good[key]].clone()
            for index, key in enumerate(keys)
            if key in good
        }
