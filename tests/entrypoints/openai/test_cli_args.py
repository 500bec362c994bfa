from __future__ import annotations

import argparse
from typing import Any

import pytest

from dist_vlm.command_line import UsageError
from dist_vlm.config import RULES, ConfigError, EngineConfig
from dist_vlm.config_load import SERVER_RULES, flag_of, load_config
from dist_vlm.config_server import ServerConfig
from dist_vlm.engine.arg_utils import HARMLESS, REFUSED, SERVER_REFUSED
from dist_vlm.entrypoints.openai.cli_args import make_arg_parser, parse_args

SERVED, ACCEPTED, REFUSED_BY_NAME = "served", "accepted", "refused"

# Every engine and server flag of vLLM 0.5.0.post1 with a value a user gives it, and what becomes of it here.
FLAGS: list[tuple[str, str | None, str]] = [
    ("--image-input-type", "pixel_values", SERVED),
    ("--image-token-id", "32000", SERVED),
    ("--image-input-shape", "1,3,336,336", SERVED),
    ("--image-feature-size", "576", SERVED),
    ("--image-processor", "/p", SERVED),
    ("--image-processor-revision", "main", SERVED),
    ("--disable-image-processor", None, SERVED),
    ("--model", "/m", SERVED),
    ("--tokenizer", "/t", SERVED),
    ("--skip-tokenizer-init", None, REFUSED_BY_NAME),
    ("--revision", "main", REFUSED_BY_NAME),
    ("--code-revision", "main", REFUSED_BY_NAME),
    ("--tokenizer-revision", "main", REFUSED_BY_NAME),
    ("--tokenizer-mode", "slow", REFUSED_BY_NAME),
    ("--trust-remote-code", None, REFUSED_BY_NAME),
    ("--download-dir", "/d", REFUSED_BY_NAME),
    ("--load-format", "safetensors", SERVED),
    ("--dtype", "half", SERVED),
    ("--kv-cache-dtype", "fp8", REFUSED_BY_NAME),
    ("--quantization-param-path", "/q", REFUSED_BY_NAME),
    ("--max-model-len", "128", SERVED),
    ("--guided-decoding-backend", "lm-format-enforcer", REFUSED_BY_NAME),
    ("--distributed-executor-backend", "mp", REFUSED_BY_NAME),
    ("--worker-use-ray", None, ACCEPTED),
    ("--pipeline-parallel-size", "2", REFUSED_BY_NAME),
    ("-pp", "2", REFUSED_BY_NAME),
    ("--tensor-parallel-size", "2", SERVED),
    ("-tp", "2", SERVED),
    ("--max-parallel-loading-workers", "3", ACCEPTED),
    ("--ray-workers-use-nsight", None, REFUSED_BY_NAME),
    ("--block-size", "32", SERVED),
    ("--enable-prefix-caching", None, SERVED),
    ("--disable-sliding-window", None, ACCEPTED),
    ("--use-v2-block-manager", None, ACCEPTED),
    ("--num-lookahead-slots", "2", REFUSED_BY_NAME),
    ("--seed", "7", SERVED),
    ("--swap-space", "8", REFUSED_BY_NAME),
    ("--gpu-memory-utilization", "0.5", SERVED),
    ("--num-gpu-blocks-override", "9", SERVED),
    ("--max-num-batched-tokens", "64", SERVED),
    ("--max-num-seqs", "4", SERVED),
    ("--max-logprobs", "3", SERVED),
    ("--disable-log-stats", None, SERVED),
    ("--quantization", "awq", REFUSED_BY_NAME),
    ("-q", "awq", REFUSED_BY_NAME),
    ("--rope-scaling", '{"type": "linear"}', REFUSED_BY_NAME),
    ("--rope-theta", "1e4", REFUSED_BY_NAME),
    ("--enforce-eager", None, ACCEPTED),
    ("--max-context-len-to-capture", "9", ACCEPTED),
    ("--max-seq-len-to-capture", "9", ACCEPTED),
    ("--disable-custom-all-reduce", None, ACCEPTED),
    ("--tokenizer-pool-size", "2", ACCEPTED),
    ("--tokenizer-pool-type", "ray", ACCEPTED),
    ("--tokenizer-pool-extra-config", "{}", ACCEPTED),
    ("--enable-lora", None, REFUSED_BY_NAME),
    ("--max-loras", "2", ACCEPTED),
    ("--max-lora-rank", "8", ACCEPTED),
    ("--lora-extra-vocab-size", "9", ACCEPTED),
    ("--lora-dtype", "auto", ACCEPTED),
    ("--long-lora-scaling-factors", "2.0", ACCEPTED),
    ("--max-cpu-loras", "2", ACCEPTED),
    ("--fully-sharded-loras", None, ACCEPTED),
    ("--device", "cpu", SERVED),
    ("--scheduler-delay-factor", "0.5", REFUSED_BY_NAME),
    ("--enable-chunked-prefill", None, ACCEPTED),
    ("--speculative-model", "/s", REFUSED_BY_NAME),
    ("--num-speculative-tokens", "2", REFUSED_BY_NAME),
    ("--speculative-max-model-len", "9", REFUSED_BY_NAME),
    ("--speculative-disable-by-batch-size", "9", REFUSED_BY_NAME),
    ("--ngram-prompt-lookup-max", "2", REFUSED_BY_NAME),
    ("--ngram-prompt-lookup-min", "2", REFUSED_BY_NAME),
    ("--model-loader-extra-config", "{}", REFUSED_BY_NAME),
    ("--preemption_mode", "swap", REFUSED_BY_NAME),
    ("--served-model-name", "a-name", SERVED),
    ("--qlora-adapter-name-or-path", "/q", REFUSED_BY_NAME),
    ("--engine-use-ray", None, REFUSED_BY_NAME),
    ("--disable-log-requests", None, ACCEPTED),
    ("--max-log-len", "9", SERVED),
    ("--host", "127.0.0.2", SERVED),
    ("--port", "8001", SERVED),
    ("--uvicorn-log-level", "trace", SERVED),
    ("--allow-credentials", None, SERVED),
    ("--allowed-origins", '["https://a.org"]', SERVED),
    ("--allowed-methods", '["GET"]', SERVED),
    ("--allowed-headers", '["x-a"]', SERVED),
    ("--api-key", "k", SERVED),
    ("--lora-modules", "a=/a", REFUSED_BY_NAME),
    ("--chat-template", "t.jinja", SERVED),
    ("--response-role", "bot", SERVED),
    ("--ssl-keyfile", "k.pem", SERVED),
    ("--ssl-certfile", "c.pem", SERVED),
    ("--ssl-ca-certs", "a.pem", SERVED),
    ("--ssl-cert-reqs", "0", SERVED),
    ("--root-path", "/v", SERVED),
    ("--middleware", "a.B", REFUSED_BY_NAME),
]
FIELDS_BY_SHORT_FLAG = {"-tp": "tensor_parallel_size", "-pp": "pipeline_parallel_size", "-q": "quantization"}


def name_of(flag: str) -> str:
    return FIELDS_BY_SHORT_FLAG.get(flag, flag.removeprefix("--").replace("-", "_"))


def test_the_table_has_every_flag_that_is_decided() -> None:
    names = {name_of(flag) for flag, _, _ in FLAGS}
    assert len(FLAGS) == 92 + len(FIELDS_BY_SHORT_FLAG)
    assert names >= {*REFUSED, *SERVER_REFUSED, *HARMLESS}
    assert names <= {*REFUSED, *SERVER_REFUSED, *HARMLESS, *RULES, *SERVER_RULES}


@pytest.mark.parametrize(("flag", "value", "becomes"), FLAGS, ids=[flag for flag, _, _ in FLAGS])
@pytest.mark.parametrize("spelled", ["as it is", "-", "_", "="])
def test_a_flag_is_served_accepted_or_refused_by_name(flag: str, value: str | None, becomes: str, spelled: str) -> None:
    if spelled == "_" and flag.startswith("--"):
        flag = "--" + flag[2:].replace("-", "_")
    elif spelled == "-":
        flag = flag.replace("_", "-")
    words = [flag] if value is None else [f"{flag}={value}"] if spelled == "=" and len(flag) > 3 else [flag, value]
    name = name_of(flag)
    if becomes == REFUSED_BY_NAME:
        with pytest.raises(ConfigError) as caught:
            parse_args(words)
        assert str(caught.value).startswith(flag_of(name))
        assert "is not served (leave it out" in str(caught.value)
        assert not str(caught.value).endswith("): ")
        return
    flags = parse_args(words)
    if becomes == ACCEPTED:
        flags.pop("log_prompts", None)  # what --disable-log-requests says is so by default
        # Of the others, one is a value of a field here.
        assert flags == ({"collectives": "group"} if name == "disable_custom_all_reduce" else {})
    else:
        assert flags == {name: "true" if value is None else value}
        assert name in RULES or name in SERVER_RULES


def test_every_flag_that_is_served_reaches_its_field() -> None:
    """Together, but for those that contradict each other or may only be left out."""
    left_out = ("--image-processor-revision", "--disable-image-processor", "-tp")
    served = [(flag, value) for flag, value, becomes in FLAGS if becomes == SERVED and flag not in left_out]
    words = [word for flag, value in served for word in (flag, value) if word is not None]
    loaded = load_config(None, parse_args(words))
    expected: dict[str, Any] = {
        "image_input_type": "pixel_values", "image_token_id": 32000, "image_input_shape": (1, 3, 336, 336),
        "image_feature_size": 576, "image_processor": "/p", "model": "/m", "tokenizer": "/t",
        "load_format": "safetensors", "dtype": "float16", "max_model_len": 128, "tensor_parallel_size": 2,
        "block_size": 32, "enable_prefix_caching": True, "seed": 7, "gpu_memory_utilization": 0.5,
        "num_gpu_blocks_override": 9, "max_num_batched_tokens": 64, "max_num_seqs": 4, "max_logprobs": 3,
        "disable_log_stats": True, "device": "cpu",
    }  # fmt: skip
    assert loaded.config == EngineConfig.from_fields(**expected)
    assert loaded.server == ServerConfig(
        served_model_name="a-name", max_log_len=9, host="127.0.0.2", port=8001, uvicorn_log_level="trace",
        allow_credentials=True, allowed_origins=("https://a.org",), allowed_methods=("GET",), allowed_headers=("x-a",),
        api_key="k", chat_template="t.jinja", response_role="bot", ssl_keyfile="k.pem", ssl_certfile="c.pem",
        ssl_ca_certs="a.pem", ssl_cert_reqs=0, root_path="/v",
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--swap-space", "4"],
        ["--swap-space=0.0"],
        ["--kv-cache-dtype", "auto"],
        ["--quantization", "None"],
        ["--rope-scaling", "none"],
        ["--pipeline-parallel-size", "1"],
        ["--scheduler-delay-factor", "0"],
        ["--preemption-mode", "recompute"],
        ["--guided-decoding-backend", "outlines"],
        ["--tokenizer-mode", "auto"],
    ],
)
def test_a_value_that_changes_nothing_is_accepted(words: list[str]) -> None:
    assert parse_args(words) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--swap-space", "8"], "--swap-space = '8': is not served (leave it out, or give 4 or 0): a preempted"),
        (["--trust_remote_code"], "--trust-remote-code is not served (leave it out): code of a checkpoint is never"),
        (["--lora-modules", "a=/a", "b=/b"], "--lora-modules = 'a=/a b=/b': is not served (leave it out): LoRA"),
        (["--middleware", "a", "--middleware", "b"], "--middleware = 'b': is not served"),
        (["--served-model-name", "a", "b"], "--served-model-name = 'a b': one name is served"),
        (["--distributed-executor-backend", "ray", "--executor", "inline"], "contradicts --executor: give only one"),
        (["--disable-log-requests", "--log-prompts"], "--disable-log-requests: contradicts --log-prompts"),
    ],
)
def test_what_is_refused_says_why(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(words)
    assert message in str(caught.value)


def test_flags_of_the_same_meaning_agree() -> None:
    assert parse_args(["--distributed-executor-backend", "ray", "--executor", "ray"]) == {"executor": "ray"}
    assert parse_args(["--disable-log-requests"]) == {"log_prompts": "false"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chat-templat", "x"], "unknown flag --chat-templat; the nearest is --chat-template"),
        (["--image_token", "x"], "unknown flag --image-token; the nearest is --image-token-id"),
        (["--model", "m", "n"], "unknown argument n"),
        (["--port"], "argument --port: expected one argument"),
    ],
)
def test_an_unknown_flag_is_told_the_nearest(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_args(words)
    assert message in str(caught.value)


def test_values_keep_their_underscores() -> None:
    words = ["--served_model_name", "my_model", "--image_input_type=pixel_values", "--chat-template", "{{ --a_b }}"]
    expected = {"served_model_name": "my_model", "image_input_type": "pixel_values", "chat_template": "{{ --a_b }}"}
    assert parse_args(words) == expected


def test_the_help_tells_what_becomes_of_each() -> None:
    parser = make_arg_parser()
    text = " ".join(parser.format_help().split())
    assert "--enforce-eager accepted, and changes nothing" in text
    assert "--enable-chunked-prefill accepted, and changes nothing" in text
    assert "--swap-space TEXT not served (leave it out, or give 4 or 0): a preempted" in text
    helped = {flag for action in parser._actions for flag in action.option_strings if action.help != argparse.SUPPRESS}
    assert {flag_of(name) for name in (*RULES, *SERVER_RULES, *REFUSED, *SERVER_REFUSED, *HARMLESS)} <= helped
