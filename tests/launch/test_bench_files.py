from __future__ import annotations

from pathlib import Path

import pytest

from dist_vlm import ConfigError
from dist_vlm.launch.bench_files import Target


def test_a_folder_has_a_file_for_each_measurement(tmp_path: Path) -> None:
    target = Target("--out", str(tmp_path / "new"), ".json", is_folder=True)
    target.check()
    target.check()  # it may be there
    for name in ("a", "b"):
        target.write(name, f"of {name}")
    assert {path.name: path.read_text() for path in (tmp_path / "new").iterdir()} == {
        "a.json": "of a",
        "b.json": "of b",
    }


def test_a_file_is_that_of_the_one_measurement(tmp_path: Path) -> None:
    target = Target("--out", str(tmp_path / "figures"), ".json", is_folder=False)
    target.check()
    assert not list(tmp_path.iterdir())
    target.write("a", "of a")
    assert (tmp_path / "figures").read_text() == "of a"


@pytest.mark.parametrize(
    ("flag", "path", "ending", "is_folder", "problem"),
    [
        ("--out", ".", ".json", False, "must be a file in an existing directory"),
        ("--out", "absent/a.json", ".json", False, "must be a file in an existing directory"),
        ("--plot", "a.png", ".svg", False, "must end in .svg: no other form is drawn"),
        ("--out", "file", ".json", True, "must be a directory, or a new one in another (File exists)"),
        (
            "--plot",
            "absent/a",
            ".svg",
            True,
            "must be a directory, or a new one in another (No such file or directory)",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str, path: str, ending: str, is_folder: bool, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError) as caught:
        Target(flag, path, ending, is_folder).check()
    assert str(caught.value) == f"{flag} = {path!r}: {problem}"
