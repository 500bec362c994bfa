"""The collectives over shared memory under the thread, address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from dist_vlm.kernels.compiler import find_compiler

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parents[1] / "kernels"
SOURCE = HERE / "shared_memory_stress.cpp"
COMMON = ("-std=c++17", "-O1", "-g", "-w", "-Wno-psabi", "-pthread")
# For this machine's vector instructions, and for those that any machine of its kind has.
BUILDS = {
    "thread": ("-fsanitize=thread", "-march=native"),
    "address-undefined": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
    "address-undefined-native": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-march=native"),
}
ROUNDS = {2: 8000, 3: 5000, 4: 3000}


def build(source: Path, sanitizer: str, folder: Path) -> Path:
    """The program; skips where there is no compiler or it does not have the sanitizer."""
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    options = [*COMMON, *BUILDS[sanitizer]]
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([compiler, *options, str(probe), "-o", str(folder / "probe")], check=False).returncode:
        pytest.skip(f"the compiler has no sanitizer for {sanitizer}")
    built = folder / "stress"
    subprocess.run([compiler, *options, str(source), "-o", str(built)], check=True, timeout=250)
    return built


@pytest.fixture(scope="module", params=BUILDS)
def stress(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(SOURCE, request.param, tmp_path_factory.mktemp("stress"))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ranks", ROUNDS)
def test_no_sanitizer_finds_anything(stress: Path, ranks: int) -> None:
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=1"}
    command = [str(stress), str(ranks), str(ROUNDS[ranks])]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")


FAULTS = {
    "no meeting": (
        "if (!wait_for((rank_ + step) % world_size_, target, &began, &next_look)) return false;",
        "(void)step, (void)began, (void)next_look;",
    ),
    "one buffer": ("buffer_ ^= 1;", "buffer_ = 0;"),
    "no acquire": (
        "return __atomic_load_n(word, __ATOMIC_ACQUIRE);",
        "return __atomic_load_n(word, __ATOMIC_RELAXED);",
    ),
}
# With it the ranks would stop at the first fault, sometimes before anything has raced.
AGREEMENT = "if (others) fail(kMismatch, 0.0, others);\n        return others == 0;"


@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", FAULTS)
def test_the_thread_sanitizer_sees_a_planted_fault(tmp_path: Path, fault: str) -> None:
    """It would not if, say, the ranks had mappings of their own."""
    text = (KERNELS / "shared_memory.h").read_text()
    right, wrong = FAULTS[fault]
    assert text.count(right) == text.count(AGREEMENT) == 1
    (tmp_path / "kernels").mkdir()
    for name in ("common.h", "add_norm.h"):
        (tmp_path / "kernels" / name).write_text((KERNELS / name).read_text())
    spoiled = text.replace(right, wrong).replace(AGREEMENT, "return true;")
    (tmp_path / "kernels" / "shared_memory.h").write_text(spoiled)
    source = tmp_path / "tests" / "kernels" / SOURCE.name
    source.parent.mkdir(parents=True)
    source.write_text(SOURCE.read_text())
    built = build(source, "thread", tmp_path)
    env = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run([str(built), "2", "1000"], capture_output=True, text=True, env=env, check=False, timeout=120)
    assert done.returncode != 0 and "data race" in done.stderr
