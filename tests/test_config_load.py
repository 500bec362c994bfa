from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dist_vlm.config import RULES, SECTIONS, ConfigError, EngineConfig
from dist_vlm.config_load import (
    SERVER_RULES,
    LoadedConfig,
    add_config_flags,
    config_flags,
    dump_yaml,
    flag_of,
    load_config,
)
from dist_vlm.config_server import ServerConfig

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHIPPED = sorted(CONFIGS.glob("*.yaml"))
EXPECTED = {
    "demo": (2, 1, 1),
    "llava-1.5-7b-1gpu": (1, 1, 1),
    "llava-1.5-7b-2gpu": (2, 1, 1),
    "llava-1.5-7b-4gpu": (4, 1, 1),
    "llava-1.5-7b-8gpu": (8, 1, 1),
    "llava-1.5-7b-2node": (8, 2, 2),
    "llava-70b-4gpu": (4, 1, 1),
    "llava-70b-8gpu": (8, 1, 1),
}


def written(folder: Path, text: str) -> str:
    path = folder / "launch.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def error_of(folder: Path, text: str, flags: dict[str, str] | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(written(folder, text), flags)
    return str(caught.value).replace(str(folder) + os.sep, "")


def test_a_file_gives_the_fields_it_names_and_defaults_for_the_rest(tmp_path: Path) -> None:
    text = "model:\n  model: /models/m\n  dtype: half\nvision:\n  image_input_shape: [1, 3, 56, 56]\ncache:\n"
    loaded = load_config(written(tmp_path, text))
    assert loaded.config == EngineConfig.from_fields(model="/models/m", dtype="float16", image_input_shape="1,3,56,56")
    assert set(loaded.sources) == {"model", "dtype", "image_input_shape"}


@pytest.mark.parametrize(
    ("given", "found"),
    [("./m", "{folder}/m"), ("../m", "{parent}/m"), ("m", "m"), ("/models/m", "/models/m"), ("..m/x", "..m/x")],
)
def test_a_dotted_path_is_relative_to_the_file(tmp_path: Path, given: str, found: str) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    loaded = load_config(written(folder, f"model: {{model: {given}, tokenizer: {given}}}"))
    expected = found.format(folder=folder, parent=tmp_path)
    assert (loaded.config.model.model, loaded.config.model.tokenizer) == (expected, expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "parallel: {tensor_parallel_sise: 2}",
            "launch.yaml: parallel.tensor_parallel_sise = 2: unknown key; the nearest is parallel.tensor_parallel_size",
        ),
        (
            "scheduler: {max_num_seqs: many}",
            "launch.yaml: scheduler.max_num_seqs = 'many': must be an integer, at least 1 (it is a string)",
        ),
        (
            'scheduler: {max_num_seqs: "8"}',
            "launch.yaml: scheduler.max_num_seqs = '8': must be an integer, at least 1 (it is a string)",
        ),
        (
            "model: {model: m, block_size: 8}",
            "launch.yaml: model.block_size = 8: unknown key in model; it belongs in cache.block_size",
        ),
        (
            "model: {model: m, blok_size: 8}",
            "launch.yaml: model.blok_size = 8: unknown key; the nearest is cache.block_size",
        ),
        (
            "scheduler: {zzz: 8}",
            "launch.yaml: scheduler.zzz = 8: unknown key; scheduler has "
            "max_num_seqs, max_num_batched_tokens, max_steps_in_flight, max_logprobs",
        ),
        (
            "paralel: {}",
            "launch.yaml: paralel: unknown section; the sections are "
            "model, vision, cache, scheduler, parallel, scaling, observability, server; the nearest is parallel",
        ),
        (
            "max_num_seqs: 4",
            "launch.yaml: max_num_seqs: unknown section; the key max_num_seqs belongs in scheduler.max_num_seqs",
        ),
        (
            "scheduler: 4",
            "launch.yaml: scheduler = 4: must be a mapping of its keys max_num_seqs, max_num_batched_tokens",
        ),
        (
            "model: {model: m}\nparallel: {executor: inline, tensor_parallel_size: 2}",
            "launch.yaml: parallel.tensor_parallel_size = 2: must be 1 with parallel.executor = 'inline', "
            "which is one process; allowed for tensor_parallel_size: 1",
        ),
        ("cache: {gpu_memory_utilization: .nan}", "gpu_memory_utilization = nan: must be a number, above 0, at most 1"),
        ("cache: {block_size: 16.0}", "launch.yaml: cache.block_size = 16.0: must be one of 8, 16, 32"),
        (
            "scheduler: {max_num_seqs: yes}",
            "launch.yaml: scheduler.max_num_seqs = True: must be an integer, at least 1",
        ),
        ("scheduler: {max_num_seqs: }", "launch.yaml: scheduler.max_num_seqs = None: must be an integer, at least 1"),
        ("model: {dtype: auto}", "launch.yaml: model.model is missing: a checkpoint directory is needed"),
        ("model: {model: m, seed: 2026-01-01}", "launch.yaml: model.seed = datetime.date(2026, 1, 1): must be"),
        ("", "launch.yaml: is empty; a configuration has the sections model, vision, cache"),
        ("# nothing\n", "launch.yaml: is empty"),
        ("- model", "launch.yaml: must hold a mapping of the sections"),
        ("just words", "launch.yaml: must hold a mapping of the sections"),
        ("7", "not a number"),
        ("1: {}", "launch.yaml: line 1: the key 1 must be a string"),
        ("model: {model: m}\n? [a, b]\n: 1", "launch.yaml: line 2: the key ['a', 'b'] must be a string"),
        ("model: {true: m}", "launch.yaml: line 1: the key True must be a string"),
        ("model: {model: m}\nmodel: {model: n}", "launch.yaml: line 2: the key 'model' is given twice"),
        ("model:\n  model: m\n  seed: 1\n  seed: 1", "launch.yaml: line 4: the key 'seed' is given twice"),
        ("model: [", "launch.yaml: is not YAML: "),
        ("model: !!python/object/apply:os.getcwd []", "launch.yaml: is not YAML: "),
        ("a: 1\n---\nb: 2", "launch.yaml: is not YAML: "),
        ("model: \x07", "launch.yaml: is not YAML: "),
        ("[" * 3000, "launch.yaml: is not"),
    ],
)
def test_a_wrong_file_is_an_error_that_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    found = error_of(tmp_path, text)
    assert message in found
    assert "\n" not in found


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="absent.yaml: cannot be read: No such file"):
        load_config(str(tmp_path / "absent.yaml"))
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes("model: {model: caf\xe9}".encode("latin-1"))
    with pytest.raises(ConfigError, match="latin.yaml: is not UTF-8 text"):
        load_config(str(tmp_path / "latin.yaml"))


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
KEYS = st.sampled_from([*SECTIONS, "server", *RULES, *SERVER_RULES, "x"]) | st.text(max_size=5) | st.integers()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4))


SECTION_NAMES = st.sampled_from([*SECTIONS, "server"])
FIELD_NAMES = st.sampled_from([*RULES, *SERVER_RULES])


@given(TREES | st.dictionaries(SECTION_NAMES, st.dictionaries(FIELD_NAMES, SCALARS | st.lists(SCALARS, max_size=2))))
def test_any_document_loads_or_is_refused(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = written(tmp_path_factory.getbasetemp(), yaml.safe_dump(tree))
    found = _outcome(path)
    assert isinstance(found, LoadedConfig) or found.startswith(path)


def _outcome(path: str) -> LoadedConfig | str:
    try:
        return load_config(path)
    except ConfigError as error:
        return str(error)


def test_flags_lie_over_the_file_and_say_so(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {model: m}\nscheduler: {max_num_seqs: 4}")
    loaded = load_config(path, {"max_num_seqs": "9", "share_gpu": "true", "max_model_len": "none"})
    assert (loaded.config.scheduler.max_num_seqs, loaded.config.parallel.share_gpu) == (9, True)
    assert loaded.sources == {
        "model": path,
        "max_num_seqs": "--max-num-seqs",
        "share_gpu": "--share-gpu",
        "max_model_len": "--max-model-len",
    }


def test_flags_alone_are_a_configuration() -> None:
    assert load_config(None, {"model": "./m"}).config.model.model == "./m"
    with pytest.raises(ConfigError, match=r"^model.model is missing: .* \(or --model DIR\)$"):
        load_config(None, {"dtype": "half"})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"max_num_seqs": "many"}, "--max-num-seqs = 'many': must be an integer, at least 1"),
        ({"max_num_seqs": "0"}, "--max-num-seqs = '0': must be an integer, at least 1"),
        ({"image_input_shape": "1,3"}, "--image-input-shape = '1,3': must be four integers"),
        ({"num_nodes": "2"}, "--num-nodes = 2: must be at most parallel.replicas, which is 1"),
        ({"ray_address": "head"}, "--ray-address = 'head': must be auto, HOST:PORT"),
    ],
)
def test_a_wrong_flag_is_named_as_typed(tmp_path: Path, flags: dict[str, str], message: str) -> None:
    assert error_of(tmp_path, "model: {model: m}", flags).startswith(message)


def parsed(*words: str) -> dict[str, str]:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_config_flags(parser)
    return config_flags(parser.parse_args(words))


def test_every_field_is_a_flag_and_no_other_exists() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    add_config_flags(parser)
    booleans = {name for name, rule in RULES.items() if rule.kind == "bool"}
    expected = {flag_of(name) for name in RULES} | {"--no-" + flag_of(name)[2:] for name in booleans} | {"-tp"}
    assert {flag for action in parser._actions for flag in action.option_strings} == expected
    assert len(expected) == len(RULES) + len(booleans) + 1
    assert "--tensor-parallel-size" in expected


def test_only_given_flags_are_read_back() -> None:
    assert parsed() == {}
    assert parsed("-tp", "2", "--dtype", "half") == {"tensor_parallel_size": "2", "dtype": "half"}
    assert parsed("--share-gpu") == {"share_gpu": "true"}
    assert parsed("--share-gpu", "--no-share-gpu") == {"share_gpu": "false"}


FILLED = {
    "model": "/models/a: b",
    "tokenizer": "/t",
    "dtype": "float16",
    "load_format": "dummy",
    "max_model_len": 77,
    "seed": 5,
    "image_input_type": "pixel_values",
    "image_token_id": 9,
    "image_input_shape": (1, 3, 8, 8),
    "image_feature_size": 4,
    "image_processor": "/p",
    "disable_image_processor": False,
    "max_image_pixels": 99,
    "max_images_per_prompt": 2,
    "block_size": 8,
    "gpu_memory_utilization": 0.5,
    "kv_cache_memory_gib": 0.001,
    "num_gpu_blocks_override": 12,
    "max_num_seqs": 3,
    "max_num_batched_tokens": 7,
    "max_steps_in_flight": 3,
    "max_logprobs": 5,
    "feature_cache_tokens": 99,
    "vision_data_parallel": False,
    "enable_prefix_caching": False,
    "engine_process": True,
    "tensor_parallel_size": 2,
    "executor": "fake",
    "replicas": 4,
    "num_nodes": 2,
    "device": "cpu",
    "ray_address": "head:6379",
    "transport": "direct",
    "start_timeout_s": 1.5,
    "step_timeout_s": 2.0,
    "max_restarts": 5,
    "threads_per_rank": 3,
    "kernels": "reference",
    "share_gpu": True,
    "collectives": "strict",
    "collectives_table": "/t",
    "halve_step_tokens": 2048,
    "app_name": "two",
    "max_replicas": 6,
    "target_requests_per_replica": 9,
    "upscale_delay_s": 1.0,
    "downscale_delay_s": 2.0,
    "replica_health_period_s": 3.0,
    "replica_health_timeout_s": 4.0,
    "replica_drain_timeout_s": 5.0,
    "disable_log_stats": False,
}


def test_the_three_forms_give_one_configuration(tmp_path: Path) -> None:
    config = EngineConfig.from_fields(**FILLED)
    defaults = EngineConfig.from_fields(model="m").fields()
    same = [name for name, value in config.fields().items() if value == defaults[name]]
    assert same == ["image_processor_revision", "disable_image_processor"]
    texts = {
        name: ",".join(map(str, value)) if isinstance(value, tuple) else str(value) for name, value in FILLED.items()
    }
    assert load_config(None, texts).config == config
    assert load_config(written(tmp_path, dump_yaml(config))).config == config


def test_a_dump_can_say_where_values_come_from(tmp_path: Path) -> None:
    config = EngineConfig.from_fields(model="/m")
    text = dump_yaml(config, dict.fromkeys(RULES, "default"))
    assert "  model: /m  # default\n" in text
    assert load_config(written(tmp_path, text)).config == config


def test_the_shipped_files_are_the_known_ones() -> None:
    assert {file.stem for file in SHIPPED} == set(EXPECTED)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_shipped_file_loads_and_resolves(file: Path, facts_7b: Path) -> None:
    loaded = load_config(str(file), {"model": str(facts_7b)})
    parallel = loaded.config.parallel
    assert (parallel.tensor_parallel_size, parallel.replicas, parallel.num_nodes) == EXPECTED[file.stem]
    resolved = loaded.resolve()
    assert resolved.vision.image_input_shape == (1, 3, 336, 336)
    assert resolved.model.max_model_len == (2048 if file.stem == "demo" else 4096)


@pytest.mark.parametrize("file", [file for file in SHIPPED if file.stem != "demo"], ids=lambda file: file.stem)
def test_a_shipped_file_without_its_checkpoint_is_a_clean_error(file: Path) -> None:
    loaded = load_config(str(file))
    with pytest.raises(ConfigError) as caught:
        loaded.resolve()
    assert str(caught.value).startswith(f"{file}: model.model = '/models/")
    assert loaded.resolve(checkpoint=False).model == loaded.config.model


def test_an_error_of_resolving_names_the_flag_or_the_file(facts_7b: Path, tmp_path: Path) -> None:
    path = written(tmp_path, f"model: {{model: {facts_7b}, max_model_len: 5000}}")
    with pytest.raises(ConfigError, match="launch.yaml: model.max_model_len = 5000: must be an integer from 1 to 4096"):
        load_config(path).resolve()
    with pytest.raises(ConfigError, match="^--max-model-len = 6000: must be an integer from 1 to 4096"):
        load_config(path, {"max_model_len": "6000"}).resolve()


# ---- the server's section ----

SERVER_FILLED = {
    "host": "0.0.0.0",
    "port": 0,
    "served_model_name": "a: b",
    "chat_template": "{{ messages }} # \n'",
    "response_role": "model",
    "root_path": "/v/1",
    "allowed_origins": ("https://a.org",),
    "allowed_methods": ("GET", "POST"),
    "allowed_headers": ("x-a",),
    "allow_credentials": True,
    "ssl_keyfile": "/k",
    "ssl_certfile": "/c",
    "ssl_ca_certs": "/a",
    "ssl_cert_reqs": 2,
    "uvicorn_log_level": "error",
    "disable_access_log": True,
    "log_prompts": True,
    "max_log_len": 9,
    "disable_page": True,
    "max_queued_requests": 3,
    "max_body_mib": 1.5,
    "body_timeout_s": 2.0,
    "health_timeout_s": 3.0,
    "drain_timeout_s": 0.0,
    "allowed_media_hosts": ("*.a.org", "b.org"),
    "allowed_media_networks": ("10.0.0.0/8",),
    "disable_media_fetch": True,
    "image_fetch_timeout_s": 0.5,
    "max_image_mib": 2.0,
    "media_memory_mib": 100,
    "media_workers": 7,
    "media_worker_memory_mib": 200,
}


def test_the_three_forms_give_one_server(tmp_path: Path) -> None:
    server = ServerConfig(**SERVER_FILLED)
    assert {*SERVER_FILLED, "api_key"} == set(SERVER_RULES)
    assert not [name for name in SERVER_FILLED if getattr(server, name) == getattr(ServerConfig(), name)]
    texts = {name: ",".join(value) if isinstance(value, tuple) else str(value) for name, value in SERVER_FILLED.items()}
    assert load_config(None, {"model": "m", **texts}).server == server
    dumped = dump_yaml(EngineConfig.from_fields(model="/m"), server=server)
    loaded = load_config(written(tmp_path, dumped))
    assert (loaded.server, loaded.config) == (server, EngineConfig.from_fields(model="/m"))
    assert loaded.has_server


def test_the_server_may_be_left_out(tmp_path: Path) -> None:
    loaded = load_config(written(tmp_path, "model: {model: m}"))
    assert loaded.server == ServerConfig()
    assert not loaded.has_server
    assert "server" not in dump_yaml(loaded.config)


def test_an_engine_knows_no_field_of_the_server() -> None:
    with pytest.raises(ConfigError, match="port = 1: unknown field"):
        EngineConfig.from_fields(model="m", port=1)


def test_flags_of_the_server_lie_over_its_section(tmp_path: Path) -> None:
    path = written(tmp_path, "model: {model: m}\nserver: {port: 1, host: h, allowed_media_hosts: [a, b]}")
    loaded = load_config(path, {"port": "2", "allowed_media_hosts": "none"})
    assert (loaded.server.port, loaded.server.host, loaded.server.allowed_media_hosts) == (2, "h", None)
    assert loaded.sources == {
        "model": path, "host": path, "port": "--port", "allowed_media_hosts": "--allowed-media-hosts",
    }  # fmt: skip


def test_only_files_of_the_server_are_relative_to_the_file(tmp_path: Path) -> None:
    text = (
        "model: {model: m}\nserver:\n  ssl_keyfile: ./k\n  ssl_certfile: c\n  chat_template: ../t.jinja\n  host: ./h\n"
    )
    folder = tmp_path / "configs"
    folder.mkdir()
    server = load_config(written(folder, text)).server
    assert (server.ssl_keyfile, server.ssl_certfile) == (f"{folder}/k", "c")
    assert (server.chat_template, server.host) == (f"{tmp_path}/t.jinja", "./h")
    inline = load_config(written(folder, "model: {model: m}\nserver: {chat_template: './{{ messages }}/..'}")).server
    assert inline.chat_template == "./{{ messages }}/.."


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("server: {prot: 1}", "launch.yaml: server.prot: unknown key; the nearest is server.port"),
        ("server: {block_size: 8}", "launch.yaml: server.block_size: unknown key in server; it belongs in cache"),
        ("model: {port: 8}", "launch.yaml: model.port = 8: unknown key in model; it belongs in server.port"),
        ("port: 8", "launch.yaml: port: unknown section; the key port belongs in server.port"),
        ("serve: {}", "the nearest is server"),
        ("server: {port: '8'}", "launch.yaml: server.port = '8': must be an integer, at least 0, at most 65_535 (it"),
        ("server: {allowed_methods: GET}", "launch.yaml: server.allowed_methods = 'GET': must be a list of strings"),
        ("server: {root_path: }", "launch.yaml: server.root_path = None: must be empty, or a path such as"),
        ("model: {model: m}\nserver: {ssl_keyfile: k}", "launch.yaml: server.ssl_certfile = None: ssl_keyfile and"),
        ("server: 4", "launch.yaml: server: must be a mapping of its keys host, port"),
    ],
)
def test_a_wrong_server_is_an_error_that_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    assert message in error_of(tmp_path, text)


@pytest.mark.parametrize(
    "text",
    [
        "server: {api_key: 's3 cret'}",
        "server: {api_key: [s3cret]}",
        "server: {api_keys: s3cret}",
        "server: {password: s3cret}",
        "server: [api_key, s3cret]",
        "model: {api_key: s3cret}",
        "model: {apikey: s3cret}",
        "api_key: s3cret",
        "server: {api_key: s3cret}",
        "model: {model: m, seed: -1}\nserver: {api_key: s3cret}",
    ],
)
def test_an_error_shows_no_key(tmp_path: Path, text: str) -> None:
    found = error_of(tmp_path, text)
    assert "s3" not in found
    assert found.startswith("launch.yaml: ")


def test_a_wrong_key_of_a_flag_is_not_shown(tmp_path: Path) -> None:
    found = error_of(tmp_path, "model: {model: m}", {"api_key": "s3 cret"})
    assert found == "--api-key: must be a string of visible ASCII characters, without spaces, or none"


def test_a_dump_says_of_a_key_only_that_there_is_one(tmp_path: Path) -> None:
    engine, server = EngineConfig.from_fields(model="/m"), ServerConfig(api_key="s3cret", port=1)
    text = dump_yaml(engine, server=server)
    assert "  # api_key is set, and not shown\n" in text
    assert "s3cret" not in text
    sources = dict.fromkeys([*RULES, *SERVER_RULES], "--x")
    assert "  # api_key is set, and not shown: --x\n" in dump_yaml(engine, sources, server=server)
    assert load_config(written(tmp_path, text)).server == ServerConfig(port=1)
    assert "  api_key: null\n" in dump_yaml(engine, server=ServerConfig())


def test_the_servers_flags_are_only_there_where_they_are_asked_for() -> None:
    assert "--port" not in argparse_flags()
    asked = argparse_flags([*RULES, *SERVER_RULES])
    assert {flag_of(name) for name in SERVER_RULES} | {"--no-log-prompts"} <= asked


def argparse_flags(*names: Any) -> set[str]:
    parser = argparse.ArgumentParser(add_help=False)
    add_config_flags(parser, *names)
    return {flag for action in parser._actions for flag in action.option_strings}


def test_the_environment_is_read_when_the_server_is_resolved(tmp_path: Path) -> None:
    loaded = load_config(written(tmp_path, "model: {model: ./m}"))
    server = loaded.resolve_server({"VLLM_API_KEY": "k", "DIST_VLM_IMAGE_FETCH_TIMEOUT": "2"})
    assert (server.api_key, server.image_fetch_timeout_s, server.served_model_name) == ("k", 2.0, f"{tmp_path}/m")
    with pytest.raises(ConfigError, match="^VLLM_IMAGE_FETCH_TIMEOUT = 'x': must be a number of seconds"):
        loaded.resolve_server({"VLLM_IMAGE_FETCH_TIMEOUT": "x"})
