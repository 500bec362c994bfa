"""`dist-vlm submit`: runs another command as a job of a Ray cluster."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dist_vlm.command_line import UsageError
from dist_vlm.config import RULES, ConfigError
from dist_vlm.config_load import SERVER_RULES, LoadedConfig, config_flags, flag_of, load_config
from dist_vlm.launch import generate
from dist_vlm.launch.job_package import LAUNCH_FILE, is_relative, packed

_TEXT = """\
Runs a command as a job of a Ray cluster: dist-vlm submit FILE -- serve|generate|check, and what that command takes.

The job takes this package along, and the launch file; of the cluster's machines it asks for the packages that this one
depends on. Checkpoints, inputs and outputs are on storage that the cluster sees, under the paths given here; with
--working-dir a folder goes along, less what its .gitignore and .rayignore name, and relative paths start there. The
machine that runs the command needs no GPU: Ray places the ranks.

The cluster is the one at --address, else at RAY_API_SERVER_ADDRESS or RAY_ADDRESS (http://...), else
http://127.0.0.1:8265. Its token is Ray's to send: RAY_AUTH_MODE=token and RAY_AUTH_TOKEN.

With --wait the job's log is followed and its exit status passed on (130 if it was stopped). An interrupt ends the
waiting, not the job."""

_COMMANDS = ("serve", "generate", "check")
# Flags of the commands that name files, beside those of the configuration.
_PATHS = ("input", "output", "media_root", "image")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def add_command(commands: Any) -> None:
    submit = commands.add_parser(
        "submit",
        help="run a command as a job of a Ray cluster",
        usage="dist-vlm submit FILE [flags] -- serve|generate|check [its flags]",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    submit.add_argument("file", metavar="FILE", help="YAML file of the launch")
    submit.add_argument("--address", metavar="URL", help="the cluster's dashboard, as http://head:8265")
    submit.add_argument("--wait", action="store_true", help="follow the log, and end as the job ends")
    submit.add_argument("--job-id", metavar="NAME", help="the job's name (none: Ray gives one)")
    submit.add_argument("--working-dir", metavar="DIR", help="a folder that goes along; the job runs in its copy")
    submit.add_argument(
        "--env", action="append", default=[], metavar="NAME=VALUE", help="a variable of the job's environment"
    )
    submit.add_argument("--python", metavar="PATH", help="the interpreter there (none: python, else python3)")
    submit.add_argument(
        "--dry-run", action="store_true", help="send nothing: show the launch and where its replicas would be placed"
    )
    submit.set_defaults(run=run, inner=[])


def run(arguments: argparse.Namespace) -> int:
    launch = load_config(arguments.file)
    if arguments.dry_run:
        from dist_vlm.launch.dry_run import dry_run

        if arguments.address is not None:
            raise UsageError("--address goes with a job, and --dry-run sends none: it places on a made-up cluster")
        dry_run(_merged(arguments.file, arguments.inner)[1] if arguments.inner else launch)
        return 0
    if arguments.job_id is not None and not _JOB_ID.fullmatch(arguments.job_id):
        problem = "must be letters, digits, '.', '_' and '-', beginning with a letter or a digit"
        raise ConfigError(problem, field="job-id", value=arguments.job_id, source="--job-id")
    inner, merged = _merged(arguments.file, arguments.inner)
    _check_files(inner, working_dir=arguments.working_dir)
    _check_launch(merged)
    return _submit(arguments, launch, drain_timeout_s=merged.server.drain_timeout_s)


def _merged(file: str, words: Sequence[str]) -> tuple[argparse.Namespace, LoadedConfig]:
    """The inner command, parsed as the job will parse it, and the launch with its flags. Raises what is wrong."""
    from dist_vlm.launch.cli import build_parser

    if not words:
        raise UsageError(f"a command is missing: dist-vlm submit {file} -- {'|'.join(_COMMANDS)} ...")
    if words[0] not in _COMMANDS:
        raise UsageError(f"{words[0]!r} cannot be submitted: must be one of {', '.join(_COMMANDS)}")
    if any(word == "--config" or word.startswith("--config=") for word in words):
        raise UsageError(f"--config {file} is given by submit itself")
    if any(word == "--api-key" or word.startswith("--api-key=") for word in words):
        raise UsageError("--api-key would stand in the job's log: set DIST_VLM_API_KEY, which the job is given")
    inner = build_parser().parse([words[0], "--config", file, *words[1:]])
    if words[0] == "generate":
        generate.check_flags(inner)
    return inner, load_config(file, config_flags(inner))


def _check_launch(loaded: LoadedConfig) -> None:
    if loaded.config.parallel.device == "auto":
        problem = (
            "must be cpu or cuda in a submitted launch: the machine that starts the job need not be like the others"
        )
        raise loaded.located(ConfigError(problem, field="parallel.device", value="auto"))
    loaded.resolve(checkpoint=os.path.isdir(loaded.config.model.model))


def _check_files(inner: argparse.Namespace, *, working_dir: str | None) -> None:
    """Raises `ConfigError` for a relative path that would lead nowhere, or to where nothing is kept."""
    if working_dir is not None and not os.path.isdir(working_dir):
        raise ConfigError(
            "must be an existing directory", field="working-dir", value=working_dir, source="--working-dir"
        )
    output = getattr(inner, "output", None)
    if output is not None and is_relative(output):
        problem = "must be an absolute path on storage that outlives the job: its own folder is removed with it"
        raise ConfigError(problem, field="output", value=output, source="--output")
    rules = {**RULES, **SERVER_RULES}
    paths = [(name, text) for name, text in config_flags(inner).items() if rules[name].of_kind.names_path(text)]
    for name in _PATHS:
        given = getattr(inner, name, None)
        paths += [(name, one) for one in (given if isinstance(given, list) else [given]) if one]
    for name, path in paths:
        if working_dir is None and is_relative(path):
            problem = "must be an absolute path that the cluster sees, or one into --working-dir"
            raise ConfigError(problem, field=name, value=path, source=flag_of(name))


def _submit(arguments: argparse.Namespace, launch: LoadedConfig, *, drain_timeout_s: float) -> int:
    from dist_vlm.launch.job_client import JobClient, exit_status, job_address

    variables = dict(_variable(text) for text in arguments.env)
    address, source = job_address(arguments.address, os.environ)
    client = JobClient(address, source)
    with tempfile.TemporaryDirectory(prefix="dvlm-job-") as folder:
        runtime_env = packed(
            launch,
            Path(folder),
            working_dir=arguments.working_dir,
            drain_timeout_s=drain_timeout_s,
            variables=variables,
            environ=os.environ,
        )
        entrypoint = entrypoint_of(arguments.inner, python=arguments.python)
        job_id = client.submit(entrypoint, runtime_env=runtime_env, job_id=arguments.job_id)
    if not arguments.wait:
        print(job_id)
        print(_told(job_id, address), file=sys.stderr)
        return 0
    print(f"dist-vlm: job {job_id} at {address}", file=sys.stderr)
    try:
        details = client.follow(job_id, _write)
    except KeyboardInterrupt:
        print(f"dist-vlm: job {job_id} goes on.\n{_told(job_id, address)}", file=sys.stderr)
        raise
    status = exit_status(details)
    print(f"dist-vlm: job {job_id} {details.status.lower()}, exit status {status}", file=sys.stderr)
    if details.status != "SUCCEEDED" and details.driver_exit_code is None and details.message:
        print(f"dist-vlm: {' '.join(details.message.split())[:2000]}", file=sys.stderr)
    return status


def entrypoint_of(words: Sequence[str], *, python: str | None) -> str:
    """The job's shell command. It becomes the command itself, so that a signal to the job is one to it."""
    found = '"$(command -v python || command -v python3)"' if python is None else shlex.quote(python)
    command = shlex.join([words[0], "--config", LAUNCH_FILE, *words[1:]])
    return f"exec {found} -m dist_vlm.launch.cli {command}"


def _variable(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not _NAME.fullmatch(name):
        # The value may be a secret.
        raise ConfigError("must be NAME=VALUE", field="env", value=name if equals else text, source="--env")
    return name, value


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _told(job_id: str, address: str) -> str:
    lines = (f"  ray job {verb} --address {address} {job_id}" for verb in ("logs --follow", "status", "stop"))
    return "\n".join(lines)
