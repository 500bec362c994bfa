"""Uses the package that is installed beside this interpreter: the command, a resolved configuration, imports.

Run as `python scripts/try_installed.py NAME CHECKPOINT` from a directory outside the source tree. NAME is how it was
installed ("editable", "wheel", "sdist"); CHECKPOINT is a directory with a config.json. Exits with a message at the
first thing that is wrong.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import sysconfig
from pathlib import Path

ONE_ROOT = ("workers", "kernels", "launch")


def main() -> None:
    name, checkpoint = sys.argv[1], str(Path(sys.argv[2]).resolve())
    sys.path[:] = [entry for entry in sys.path if entry not in ("", str(Path(__file__).parent))]
    for taken in ONE_ROOT:
        if importlib.util.find_spec(taken) is not None:
            sys.exit(f"{name}: a top-level package {taken!r} got installed")
    command = str(Path(sysconfig.get_path("scripts")) / "dist-vlm")
    version = _run(command, "--version")
    config = Path("launch.yaml")
    config.write_text(f"model:\n  model: {checkpoint}\nparallel:\n  tensor_parallel_size: 2\n", encoding="utf-8")
    shown = _run(command, "config", "show", str(config))
    if "max_model_len: 2048" not in shown:
        sys.exit(f"{name}: config show did not resolve max_model_len:\n{shown}")
    package = importlib.import_module("dist_vlm")
    importlib.import_module("dist_vlm.workers.plan")
    inside = Path(str(package.__file__)).is_relative_to(sysconfig.get_path("purelib"))
    if inside != (name != "editable"):
        sys.exit(f"{name}: dist_vlm was imported from {package.__file__}")
    print(f"{name}: {version.strip()} works from {Path(str(package.__file__)).parent.parent.name}/")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
