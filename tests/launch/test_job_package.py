"""What goes along with a job; that a job runs it is in test_submit.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray._private.runtime_env.packaging import get_excludes_from_ignore_files

from dist_vlm.config_fields import ConfigError
from dist_vlm.config_load import LoadedConfig, load_config
from dist_vlm.launch.job_package import LAUNCH_FILE, launch_text, packed

YAML = """
model: {model: ../model, max_model_len: 77}
vision: {image_input_shape: [1, 3, 8, 8], image_token_id: 3, image_feature_size: 4}
parallel: {replicas: 2}
scaling: {app_name: two}
server: {port: 9, api_key: very-secret, allowed_origins: ["https://a.example"], drain_timeout_s: 12.5}
"""


@pytest.fixture
def loaded(tmp_path: Path) -> LoadedConfig:
    (tmp_path / "launches").mkdir()
    file = tmp_path / "launches" / "launch.yaml"
    file.write_text(YAML)
    return load_config(str(file))


def pack(loaded: LoadedConfig, folder: Path, **changes: Any) -> dict[str, Any]:
    folder.mkdir()
    given: dict[str, Any] = {"working_dir": None, "drain_timeout_s": 12.5, "variables": {}, "environ": {}, **changes}
    return packed(loaded, folder, **given)


def test_the_launch_means_the_same_elsewhere_and_holds_no_key(loaded: LoadedConfig, tmp_path: Path) -> None:
    text = launch_text(loaded)
    assert "very-secret" not in text
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(text)
    again = load_config(str(elsewhere))
    assert again.config == loaded.config
    assert again.config.model.model == str(tmp_path / "model"), "its paths begin at the file they stood in"
    assert again.server.port == 9 and again.server.api_key is None
    assert set(again.sources) == set(loaded.sources) - {"api_key"}, "what was left out is decided over there"


def test_the_package_goes_along_whole(loaded: LoadedConfig, tmp_path: Path) -> None:
    (module,) = map(Path, pack(loaded, tmp_path / "job")["py_modules"])
    assert module.name == "dist_vlm"
    assert not [path for path in module.rglob("*") if path.is_symlink() or path.name == "__pycache__"]
    for name in (
        "llm.py",
        "workers/worker.py",
        "kernels/paged_attention.cpp",
        "launch/cli.py",
        "server/static/index.html",
    ):
        assert (module / name).is_file(), name
    root = Path(__file__).parents[2]
    sources = {path.relative_to(root) for path in (root / "workers").rglob("*.py")}
    assert sources == {
        Path("workers") / path.relative_to(module / "workers") for path in (module / "workers").rglob("*.py")
    }


def test_a_folder_goes_along_with_the_launch_beside_its_files(loaded: LoadedConfig, tmp_path: Path) -> None:
    (tmp_path / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "mine" / "deep" / "questions.jsonl").write_text("{}")
    work = Path(pack(loaded, tmp_path / "job", working_dir=str(tmp_path / "mine"))["working_dir"])
    assert (work / "deep" / "questions.jsonl").read_text() == "{}"
    assert (work / LAUNCH_FILE).read_text() == launch_text(loaded)
    assert not (tmp_path / "mine" / LAUNCH_FILE).exists()


def test_the_key_is_a_variable_whoever_gave_it(loaded: LoadedConfig, tmp_path: Path) -> None:
    given = pack(loaded, tmp_path / "a", variables={"A": "b"})["env_vars"]
    assert given == {"RAY_JOB_STOP_WAIT_TIME_S": "23", "DIST_VLM_API_KEY": "very-secret", "A": "b"}
    (tmp_path / "open.yaml").write_text("model: {model: /m}\n")
    without = load_config(str(tmp_path / "open.yaml"))
    assert pack(without, tmp_path / "b", environ={"VLLM_API_KEY": "k"})["env_vars"]["DIST_VLM_API_KEY"] == "k"
    assert "DIST_VLM_API_KEY" not in pack(without, tmp_path / "c")["env_vars"]


def test_a_key_that_no_client_could_send_is_told_before_it_goes(loaded: LoadedConfig, tmp_path: Path) -> None:
    (tmp_path / "open.yaml").write_text("model: {model: /m}\n")
    with pytest.raises(ConfigError, match="DIST_VLM_API_KEY: must be a string of visible ASCII"):
        pack(load_config(str(tmp_path / "open.yaml")), tmp_path / "job", environ={"DIST_VLM_API_KEY": ""})


def test_the_launch_goes_along_whatever_a_folder_leaves_out(loaded: LoadedConfig, tmp_path: Path) -> None:
    """By Ray's own reading of the files, which are the user's and stay as they are."""
    (tmp_path / "mine").mkdir()
    for name in (".gitignore", ".rayignore"):
        (tmp_path / "mine" / name).write_text("*.yaml\nweights/")
    (tmp_path / "mine" / "other.yaml").touch()
    work = Path(pack(loaded, tmp_path / "job", working_dir=str(tmp_path / "mine"))["working_dir"])
    left_out = [
        path.name for path in work.iterdir() if any(no(path) for no in get_excludes_from_ignore_files(work, True))
    ]
    assert left_out == ["other.yaml"]
    assert (tmp_path / "mine" / ".gitignore").read_text() == "*.yaml\nweights/"
