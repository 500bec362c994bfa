from __future__ import annotations

import itertools
import time

import pytest
import torch

from dist_vlm.launch import bench_rates
from dist_vlm.launch.bench_rates import DeviceRates, measure, measured_rates


def test_a_rate_is_the_work_of_the_fastest_window(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ten calls a window. The first window warms up, and the third is the fastest, for the copy and for the product.
    windows = [0.1, 3.0, 0.5, 2.0, 2.0, 2.0, 0.1, 8.0, 8.0, 4.0, 8.0, 8.0]
    moments = itertools.accumulate(part for window in windows for part in (1.0, window))
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    rates = measure(torch.device("cpu"), "float32", copy_bytes=1000, matrix_size=20)
    assert rates == DeviceRates(pytest.approx(2 * 1000 * 10 / 0.5), pytest.approx(2 * 20**3 * 10 / 4.0), "float32")
    assert next(moments, None) is None


def test_without_a_gpu_the_cause_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(RuntimeError, match="the device's rates could not be measured: .*(CUDA|NVIDIA)"):
        measured_rates("bfloat16")


def test_a_device_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_rates, "_TIMEOUT_S", 0.01)
    with pytest.raises(RuntimeError, match="the device's rates were not measured within 0.01 s"):
        measured_rates("bfloat16")


@pytest.mark.gpu
def test_a_gpu_copies_and_multiplies_as_gpus_do() -> None:
    rates = measured_rates("bfloat16")
    assert 1e11 < rates.copy_bytes_per_s < 2e13
    assert 1e13 < rates.matmul_flop_per_s < 1e16
