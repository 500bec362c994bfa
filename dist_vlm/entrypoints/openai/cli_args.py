"""The flags of vLLM 0.5.0's OpenAI server, read into this project's fields.

Each is a field of the configuration, accepted because ignoring it changes nothing here, or refused by name with what to
use instead. The fields that the release did not have are flags too.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from dist_vlm.command_line import Parser
from dist_vlm.config import RULES, ConfigError
from dist_vlm.config_load import SERVER_RULES, add_config_flags, config_flags, flag_of
from dist_vlm.engine.arg_utils import HARMLESS, REFUSED, SERVER_REFUSED, check_flag

# Of the flags that are no fields, those that take no value.
_SWITCHES = frozenset(
    {
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_sliding_window",
        "enable_chunked_prefill",
        "enable_lora",
        "enforce_eager",
        "engine_use_ray",
        "fully_sharded_loras",
        "ray_workers_use_nsight",
        "skip_tokenizer_init",
        "trust_remote_code",
        "use_v2_block_manager",
        "worker_use_ray",
    }
)
_SHORT = {"pipeline_parallel_size": "-pp", "quantization": "-q"}
_LISTS = ("lora_modules",)
_NAMES = "served_model_name"
_PREFIX = "old_flag_"
_FLAG = re.compile(r"--[A-Za-z0-9_-]+(?==|$)")


def make_arg_parser() -> Parser:
    """Every flag of that server and every field; `read_flags` reads them back."""
    parser = Parser(
        prog="python -m dist_vlm.entrypoints.openai.api_server",
        description="Serves a model over HTTP in OpenAI's form; `dist-vlm serve` does the same from a YAML file.",
        allow_abbrev=False,
    )
    add_config_flags(parser, [name for name in (*RULES, *SERVER_RULES) if name != _NAMES])
    others = parser.add_argument_group("flags of other names")
    others.add_argument(
        flag_of(_NAMES), nargs="+", default=argparse.SUPPRESS, metavar="TEXT", help=SERVER_RULES[_NAMES].help
    )
    refused = {**REFUSED, **SERVER_REFUSED}
    for name in sorted({*refused, *HARMLESS} - SERVER_RULES.keys()):
        text = "accepted, and changes nothing"
        if name in refused and not (name in _SWITCHES and True in refused[name].accepted):
            text = f"not served ({refused[name].way_out}): {refused[name].instead}"
        _add_old_flag(others, name, text)
    return parser


def _add_old_flag(group: argparse._ArgumentGroup, name: str, text: str) -> None:
    flags, dest = [flag_of(name), *([_SHORT[name]] if name in _SHORT else [])], _PREFIX + name
    if name in _SWITCHES:
        group.add_argument(*flags, dest=dest, default=argparse.SUPPRESS, action="store_const", const=None, help=text)
    else:
        nargs = "+" if name in _LISTS else None
        group.add_argument(*flags, dest=dest, default=argparse.SUPPRESS, nargs=nargs, metavar="TEXT", help=text)


def parse_args(argv: Sequence[str]) -> dict[str, str]:
    """Field name to the text given for it. A flag may be spelled with - or _.

    Raises `UsageError` for a flag that does not exist, with the nearest one, and `ConfigError` for one that is not
    served, with what to use instead.
    """
    words = [_FLAG.sub(lambda match: "--" + match[0][2:].replace("_", "-"), word) for word in argv]
    arguments = make_arg_parser().parse(words)
    flags, given = config_flags(arguments), vars(arguments)
    old = {key.removeprefix(_PREFIX): given[key] for key in given if key.startswith(_PREFIX)}
    for name, value in old.items():
        if name not in HARMLESS:
            check_flag(name, " ".join(value) if isinstance(value, list) else value)
    if "distributed_executor_backend" in old:
        _agree(flags, "executor", "ray", "distributed_executor_backend")
    if "disable_custom_all_reduce" in old:
        _agree(flags, "collectives", "group", "disable_custom_all_reduce")
    if "disable_log_requests" in old:
        _agree(flags, "log_prompts", "false", "disable_log_requests")
    if _NAMES in given:
        flags[_NAMES] = _one_name(given[_NAMES])
    return flags


def _agree(flags: dict[str, str], name: str, value: str, old: str) -> None:
    """`value` for the field `name`, which the flag `old` means too. Raises `ConfigError` where it was given another."""
    if flags.setdefault(name, value) != value:
        raise ConfigError(f"contradicts {flag_of(name)}: give only one of them", field=old, source=flag_of(old))


def _one_name(names: Sequence[str]) -> str:
    if len(names) > 1:
        problem = "one name is served; have a proxy translate others"
        raise ConfigError(problem, field=_NAMES, value=" ".join(names), source=flag_of(_NAMES))
    return names[0]
