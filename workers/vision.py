"""A rank's images: staged arrays, and the features they were encoded to."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dist_vlm.kernels.upload import to_device, upload
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
class Verdict:
    """Which images of a step failed on any rank: the same on every rank, and still being computed by the device.

    keys: the images. votes: float32 [reasons, images], above zero where an image failed for that reason.
    """

    keys: tuple[str, ...]
    votes: torch.Tensor

    def to_host(self) -> Verdict:
        """Enqueues the copy; what is returned may be read once the device has come to here."""
        return Verdict(self.keys, self.votes.to("cpu", non_blocking=True))

    def failures(self) -> tuple[ImageFailure, ...]:
        reasons = _first_reasons(self.votes.tolist())
        found = tuple(ImageFailure(key, why) for key, why in zip(self.keys, reasons, strict=True) if why is not None)
        for failure in found:
            _log.warning("image %s: %s", failure.image, failure.reason)
        return found


class FeatureStore:
    """Encoded images by content key: tensors [rows, hidden_size], the same on every rank.

    batch_images: images that go through the encoder at once, at most.
    data_parallel: whether the images of a call are split over the ranks; each then encodes its share and gets the
        others' features, to the bit. Otherwise, and for a single image, each rank encodes by itself.

    `encode` waits for the device, `encode_later` does not.
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
    ) -> None:
        self.encoder = ImageEncoder(vision=vision, dtype=dtype, device=device, batch_images=batch_images)
        self.comm = comm
        self.dtype = dtype
        self.device = device
        self.hidden_size = hidden_size
        self.data_parallel = data_parallel
        self.features: dict[str, torch.Tensor] = {}

    @property
    def num_encoded(self) -> int:
        """Images that this rank's encoder has encoded since the start."""
        return self.encoder.num_encoded

    def drop(self, keys: Sequence[str]) -> None:
        for key in keys:
            self.features.pop(key, None)  # one that failed may not be held

    def encode(self, keys: Sequence[str], images: ImageStore) -> tuple[ImageFailure, ...]:
        """Encodes staged images and returns those that failed on any rank, the same list on every rank.

        One all-reduce, in which the ranks tell their failures before anything depends on them, and where images are
        split one all-gather of their features: a failure keeps no rank from either.
        """
        if not keys:
            return ()
        split = self._is_split(keys)
        done = self._encode_here(self._mine(keys), images, is_checked=True)
        reasons, num_rows = self._agree(keys, done)
        for key in keys:
            self.features.pop(key, None)
        good = {key: rows for key, rows, reason in zip(keys, num_rows, reasons, strict=True) if reason is None}
        if split and good:
            self.features.update(self._gather(keys, good, done))
        else:
            self.features.update({key: done.features[key] for key in good})
        return tuple(ImageFailure(key, reason) for key, reason in zip(keys, reasons, strict=True) if reason is not None)

    def encode_later(self, keys: Sequence[str], images: ImageStore, num_rows: Mapping[str, int]) -> Verdict | None:
        """Enqueues the encoding of staged images, and tells once the device has come so far which of them failed. None
        without images. The collectives are those of `encode`, but that failed images are gathered too.

        num_rows: feature rows of each image, as its span in a sequence has them. Every rank then holds features of
            every image, those of a failed one zeros or not finite: all compute the same slices until it is dropped.
        """
        if not keys:
            return None
        done = self._encode_here(self._mine(keys), images, is_checked=False)
        for key, features in list(done.features.items()):
            if features.shape[0] != num_rows[key]:
                _log.error("image %s: %d feature rows for %d positions", key, features.shape[0], num_rows[key])
                done.failed[key] = NOT_ENCODED
                del done.features[key], done.finite[key]
        verdict = Verdict(tuple(keys), self.comm.all_reduce(self._votes(keys, done)))
        for key in keys:
            self.features.pop(key, None)
        if self._is_split(keys):
            self.features.update(self._gather(keys, {key: num_rows[key] for key in keys}, done))
        else:
            for key in keys:
                self.features[key] = done.features[key] if key in done.features else self._zeros(num_rows[key])
        return verdict

    def _is_split(self, keys: Sequence[str]) -> bool:
        return self.data_parallel and self.comm.world_size > 1 and len(keys) > 1

    def _mine(self, keys: Sequence[str]) -> Sequence[str]:
        """The images that this rank encodes."""
        return keys[self.comm.rank :: self.comm.world_size] if self._is_split(keys) else keys

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros((*shape, self.hidden_size), dtype=self.dtype, device=self.device)

    def _votes(self, keys: Sequence[str], done: Encoded) -> torch.Tensor:
        """This rank's, see `Verdict`."""
        known = np.zeros((len(FAILURE_REASONS), len(keys)), dtype=np.float32)
        for column, key in enumerate(keys):
            if key in done.failed:
                known[FAILURE_REASONS.index(done.failed[key]), column] = 1
        votes = to_device(known, self.device)
        if columns := [column for column, key in enumerate(keys) if key in done.finite]:
            finite = torch.stack([done.finite[keys[column]] for column in columns])
            where = upload(columns, torch.int64, self.device)
            votes[FAILURE_REASONS.index(NOT_FINITE), where] = (~finite).to(torch.float32)
        return votes

    def _encode_here(self, keys: Sequence[str], images: ImageStore, *, is_checked: bool) -> Encoded:
        staged, missing = [], {}
        for key in keys:
            try:
                staged.append(StagedImage(key, *images.get(key)))
            except KeyError:
                _log.error("image %s is to be encoded, but is not staged", key)
                missing[key] = NOT_ENCODED
        done = self.encoder.encode(staged, is_checked=is_checked)
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
        return _first_reasons(failed), [int(count) for count in rows]

    def _gather(self, keys: Sequence[str], good: dict[str, int], done: Encoded) -> dict[str, torch.Tensor]:
        """All ranks' features of the `good` images, whose rows are told. Image i is the (i // ranks)-th of rank
        i % ranks; shorter shares and images are padded with zeros, and so are those that a rank has not."""
        ranks = self.comm.world_size
        share = self._zeros(-(-len(keys) // ranks), max(good.values()))
        for place, key in enumerate(keys[self.comm.rank :: ranks]):
            if key in good and key in done.features:
                share[place, : good[key]] = done.features.pop(key)
        gathered = self.comm.all_gather(share)
        return {
            key: gathered[index % ranks, index // ranks, : good[key]].clone()
            for index, key in enumerate(keys)
            if key in good
        }


def _first_reasons(votes: Sequence[Sequence[float]]) -> list[str | None]:
    """For each image why it failed, None if it did on no rank. votes: [reasons][images]."""
    return [
        next((reason for reason, vote in zip(FAILURE_REASONS, column, strict=True) if vote), None)
        for column in zip(*votes, strict=True)
    ]
