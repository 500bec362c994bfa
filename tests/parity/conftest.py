"""Ranks lent to the parity tests, and the matrix they walk."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .matrix import full, pairwise
from .ranks import Ranks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        points = full() if metafunc.config.getoption("--full-matrix") else pairwise()
        metafunc.parametrize("point", points, ids=lambda point: point.name)


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    ranks = Ranks()
    yield ranks
    ranks.close()
