"""`dist-vlm tune-collectives`: measures which way of a collective is the fastest at which size, as a table."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dist_vlm.config import ConfigError
from dist_vlm.kernels.all_reduce.rules import OPS, Rule, table_entry

_TEXT = """\
Runs on this machine's GPUs, one rank a GPU: every way of adding up the ranks' parts, with and without the norm fused
to it, at sizes of 1 to 8192 rows, as recorded steps run them. The file goes into parallel.collectives_table. An
existing file keeps what it has of other numbers of ranks."""
_ROW_COUNTS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192]
# A further rule has to be this much faster than going on with the one before it.
_WORTH = 0.97


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "tune-collectives",
        help="measure which all-reduce is the fastest at which size",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, required=True, metavar="RANKS")
    parser.add_argument("--hidden-size", type=int, default=4096, metavar="NUMBERS", help="of a row (4096)")
    parser.add_argument("--vocab-size", type=int, default=32064, metavar="TOKENS", help="of the logits (32064)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--out", required=True, metavar="FILE", help="the table, as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    from dist_vlm.launch.collective_ranks import measure

    check(arguments)
    world_size: int = arguments.tensor_parallel_size
    found = measure(
        world_size=world_size,
        hidden_size=arguments.hidden_size,
        columns=-(-arguments.vocab_size // world_size),
        dtype=arguments.dtype,
        row_counts=_ROW_COUNTS,
    )
    print(text(found["times"]))
    write_table(Path(arguments.out), found, world_size)


def check(arguments: argparse.Namespace) -> None:
    """Raises `ConfigError` for what cannot be measured here."""
    import torch

    from dist_vlm.kernels.all_reduce.peer_buffers import MAX_RANKS, MIN_RANKS

    have, ranks = torch.cuda.device_count(), arguments.tensor_parallel_size
    if not MIN_RANKS <= ranks <= MAX_RANKS or ranks > have:
        raise ConfigError(
            f"must be from {MIN_RANKS} to {MAX_RANKS}, and at most the GPUs of this machine, which are {have}",
            field="tensor_parallel_size",
            value=ranks,
        )
    for name in ("hidden_size", "vocab_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError("must be at least 1", field=name, value=getattr(arguments, name))
    if not os.path.isdir(os.path.dirname(arguments.out) or ".") or os.path.isdir(arguments.out):
        raise ConfigError("must be a file in an existing directory", field="out", value=arguments.out)
    table = read_table(Path(arguments.out))
    if table and table.get("device") != torch.cuda.get_device_name():
        device = table.get("device")
        problem = f"has the ranks of another device, {device!r}; this machine's is {torch.cuda.get_device_name()!r}"
        raise ConfigError(problem, field="out", value=arguments.out)


def read_table(path: Path) -> dict[str, Any]:
    """What is there to be added to, empty where there is no file. Raises `ConfigError` for what is no table."""
    if not path.exists():
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"is there, and must be a table: {error}", field="out", value=str(path)) from None
    if not isinstance(table, dict) or not isinstance(table.get("ranks"), dict):
        raise ConfigError("is there, and must be a table with ranks", field="out", value=str(path))
    return table


def write_table(path: Path, found: Mapping[str, Any], world_size: int) -> None:
    """Puts the rules for `world_size` ranks into the table at `path`."""
    table = read_table(path)
    rules = {op: table_entry(best_rules(found["times"], op)) for op in OPS}
    ranks = table.get("ranks", {}) | {str(world_size): rules}
    table = {"device": found["device"], "ranks": dict(sorted(ranks.items(), key=lambda item: int(item[0])))}
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


def best_rules(times: Sequence[Mapping[str, Any]], op: str) -> list[Rule]:
    """The fastest way at each measured size; between two sizes, that of the larger."""
    rules: list[Rule] = []
    for record in sorted((record for record in times if record["op"] == op), key=lambda record: record["bytes"]):
        best = record["microseconds"]
        name = min(best, key=lambda way: best[way])
        if rules:
            going_on = _way(rules[-1])
            if going_on in best and best[name] > _WORTH * best[going_on]:
                name = going_on
        path, _, fused = name.partition(" ")
        rule = Rule(record["bytes"], path, bool(fused))
        if rules and (rules[-1].path, rules[-1].fused) == (rule.path, rule.fused):
            rules.pop()
        rules.append(rule)
    return [*rules[:-1], Rule(None, rules[-1].path, rules[-1].fused)]


def _way(rule: Rule) -> str:
    return rule.path + (" fused" if rule.fused else "")


def text(times: Sequence[Mapping[str, Any]]) -> str:
    """Microseconds by way, a line an op and size; the fastest with a star."""
    lines = []
    for record in times:
        best = min(record["microseconds"].values())
        ways = (f"{way} {us:.1f}{'*' if us == best else ''}" for way, us in sorted(record["microseconds"].items()))
        lines.append(f"{record['op']:16}{record['rows']:6} rows {record['bytes']:10} bytes  {'  '.join(ways)}")
    return "\n".join(lines)
