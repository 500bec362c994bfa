"""`dist-vlm restart`: has the replicas of a running server replaced one after the other."""

from __future__ import annotations

import argparse
from typing import Any

from dist_vlm.config_fields import rules_of
from dist_vlm.config_scaling import ScalingConfig
from dist_vlm.executor.ray_cluster import RayCluster
from dist_vlm.launch.replica_lifeline import NAMESPACE
from dist_vlm.workers.failure import describe

_TEXT = """\
Replaces every replica of a running `dist-vlm serve` by a new one, a few at a time, without a failed request: those in
work end first, or go on in another replica. It says its word and returns; `serve status` shows how far it is. The
replicas are in a Ray cluster that others can join: not in the private Ray of a server that was given no address."""

_TIMEOUT_S = 30.0


def add_command(commands: Any) -> None:
    restart = commands.add_parser(
        "restart",
        help="replace the replicas of a running server",
        description=_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = ScalingConfig().app_name
    text = rules_of(ScalingConfig)["app_name"].help
    restart.add_argument("--app-name", default=default, metavar="TEXT", help=f"{text} ({default})")
    restart.add_argument(
        "--ray-address", default="auto", metavar="HOST:PORT", help="the server's Ray cluster (auto: RAY_ADDRESS)"
    )
    restart.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    import ray

    cluster = RayCluster()
    cluster.connect(arguments.ray_address, num_cpus=0, use_gpus=False, timeout_s=_TIMEOUT_S)
    try:
        anchor = ray.get_actor(arguments.app_name, namespace=NAMESPACE)
        ray.get(anchor.ask_restart.remote(), timeout=_TIMEOUT_S)
    except ValueError:
        raise RuntimeError(
            f"app_name = {arguments.app_name!r}: no server of this name has replicas in this cluster"
        ) from None
    except ray.exceptions.RayError as error:
        raise RuntimeError(
            f"app_name = {arguments.app_name!r}: its server does not answer: {describe(error)}"
        ) from None
    finally:
        cluster.close()
    print(f"the replicas of {arguments.app_name} are replaced, one after the other")
