"""Programs that import each other by name."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("benchmarks", "benchmarks/kernels", "benchmarks/peers"):
    path = str(Path(__file__).parents[2] / folder)
    if path not in sys.path:
        sys.path.append(path)
