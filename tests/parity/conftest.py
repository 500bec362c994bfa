"""Ranks lent to the parity tests, and the matrix they walk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .matrix import full, pairwise
from .ranks import Ranks

_RANKS = pytest.StashKey[Ranks]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "point" in metafunc.fixturenames:
        points = full() if metafunc.config.getoption("--full-matrix") else pairwise()
        metafunc.parametrize("point", points, ids=lambda point: point.name)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on the same ranks one after another: each change of ranks costs a start."""

    def key(item: pytest.Item) -> str:
        values = getattr(getattr(item, "callspec", None), "params", {})
        point = values.get("point")
        if point is not None:
            return f"{point.checkpoint} {point.ranks} {point.transport}"
        return f"tiny {values['num_ranks']}" if "num_ranks" in values else ""

    here = [index for index, item in enumerate(items) if item.path.parent == Path(__file__).parent]
    for index, item in zip(here, sorted((items[index] for index in here), key=key), strict=True):
        items[index] = item


@pytest.fixture(scope="session")
def ranks(pytestconfig: pytest.Config) -> Iterator[Ranks]:
    ranks = pytestconfig.stash[_RANKS] = Ranks()
    yield ranks
    ranks.close()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends the ranks with the last test in here: those of a compiled graph take processor time while they wait."""
    if (nextitem is None or nextitem.path.parent != item.path.parent) and _RANKS in item.config.stash:
        item.config.stash[_RANKS].close()
