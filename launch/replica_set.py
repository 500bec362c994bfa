"""The replicas of a launch, as an application of Ray Serve: deployed, replaced one by one, deleted."""

from __future__ import annotations

import json
import logging
import threading
import time
from contextlib import suppress
from typing import Any

from dist_vlm.config import EngineConfig
from dist_vlm.executor import placement
from dist_vlm.executor.base import StartError
from dist_vlm.executor.deadline import Deadline
from dist_vlm.launch.replica import EngineReplica
from dist_vlm.launch.replica_lifeline import Lifeline

_DEPLOYMENT = "engine"
_STAGE = "replicas"
_POLL_S = 0.2
# How often replicas tell the router of themselves.
_REPORT_S = 1.0
_REPORT_TIMEOUT_S = 10.0
# How often a replica that is to end looks whether its requests have.
_DRAIN_POLL_S = 0.2
# A replica has as many requests as run there at once, and so many times more that wait for one of those.
_WAITING_PER_RUNNING = 1
_LONGEST_CAUSE = 2000

_log = logging.getLogger(__name__)


class ReplicaSet:
    """config: resolved. Ray must be connected before `start`."""

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._name = config.scaling.app_name
        self._lifeline: Lifeline | None = None
        # Of deploying and deleting, which several threads may ask for.
        self._deploying = threading.Lock()

    def start(self, timeout_s: float) -> Any:
        """Deploys the replicas and waits until all run; returns the handle to them.

        Raises `StartError` with the cause of the first that failed, or with what they ask for and what there is.
        """
        from ray import serve

        deadline = Deadline(timeout_s)
        bundles = placement.engine_bundles_of(self._config.parallel)
        placement.check_fits(bundles, what="a replica needs")
        try:
            self._lifeline = Lifeline(self._name)
        except ValueError:
            raise StartError(
                _STAGE, f"app_name = {self._name!r}: a server of this name runs in the cluster; name this one otherwise"
            ) from None
        serve.start(proxy_location="Disabled")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)  # else each request that is aborted has a line
        self._deploy()
        while not self._all_run():
            if deadline.over:
                raise StartError(_STAGE, self._told_late(bundles, timeout_s))
            time.sleep(_POLL_S)
        return serve.get_app_handle(self._name)

    def replace_all(self) -> None:
        """Begins to replace every replica by a new one, a few at a time: requests in work end first, or go on in
        another after replica_drain_timeout_s. Serve's own doing, which this does not wait for."""
        _log.info("the replicas of %s are replaced", self._name)
        self._deploy()

    def stop(self) -> None:
        """Ends the replicas, and Serve where nobody else has an application there."""
        import ray
        from ray import serve

        with self._deploying:
            lifeline, self._lifeline = self._lifeline, None
            if lifeline is None or not ray.is_initialized():
                return
            with suppress(Exception):
                serve.delete(self._name)
            with suppress(Exception):
                if not serve.status().applications:
                    serve.shutdown()
            with suppress(Exception):
                ray.kill(lifeline.anchor)

    @property
    def anchor(self) -> Any:
        assert self._lifeline is not None, "start() makes it"
        return self._lifeline.anchor

    def _deploy(self) -> None:
        """Without a version of our own, every deployment counts as a new one: its replicas replace those before it.
        Nothing after a `stop`."""
        from ray import serve

        make_deployment: Any = serve.deployment
        deployment = make_deployment(EngineReplica).options(**_options(self._config))
        with self._deploying:
            if self._lifeline is None:
                return
            target = serve.RunTarget(
                target=deployment.bind(json.dumps(self._config.fields()), self._lifeline),
                name=self._name,
                route_prefix=None,
            )
            serve.run_many([target], wait_for_applications_running=False)

    def _all_run(self) -> bool:
        """Raises `StartError` if one could not be started."""
        status = self._status()
        if status is None:
            return False
        if status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            told = [one.message for one in status.deployments.values()] + [status.message]
            raise StartError(_STAGE, _cause_of(" ".join(told)))
        return bool(status.status == "RUNNING")

    def _status(self) -> Any:
        from ray import serve

        return serve.status().applications.get(self._name)

    def _told_late(self, bundles: list[dict[str, float]], timeout_s: float) -> str:
        status = self._status()
        deployment = None if status is None else status.deployments.get(_DEPLOYMENT)
        counts = {} if deployment is None else dict(deployment.replica_states)
        number = self._config.parallel.replicas
        return (
            f"{counts.get('RUNNING', 0)} of {number} replicas run after start_timeout_s = {timeout_s:g}; each asks for "
            f"{placement.render_sum(bundles)} on one machine; Ray has, a machine: {placement.machines()}; "
            f"free in the cluster: {placement.free()}"
        )


def _options(config: EngineConfig) -> dict[str, Any]:
    from ray.serve.config import AutoscalingConfig, RequestRouterConfig

    make_router: Any = RequestRouterConfig
    parallel, scaling, num_slots = config.parallel, config.scaling, config.scheduler.max_num_seqs
    number: dict[str, Any] = {"num_replicas": parallel.replicas}
    if scaling.max_replicas is not None:
        scale = AutoscalingConfig(
            min_replicas=parallel.replicas,
            initial_replicas=parallel.replicas,
            max_replicas=scaling.max_replicas,
            target_ongoing_requests=scaling.target_requests_per_replica or num_slots,
            upscale_delay_s=scaling.upscale_delay_s,
            downscale_delay_s=scaling.downscale_delay_s,
        )
        number = {"num_replicas": None, "autoscaling_config": scale}
    return {
        "name": _DEPLOYMENT,
        "max_ongoing_requests": num_slots * (1 + _WAITING_PER_RUNNING),
        "ray_actor_options": {"num_cpus": 1},
        "placement_group_bundles": placement.engine_bundles_of(parallel),
        "placement_group_strategy": placement.STRATEGY,
        "health_check_period_s": scaling.replica_health_period_s,
        "health_check_timeout_s": scaling.replica_health_timeout_s,
        "graceful_shutdown_wait_loop_s": _DRAIN_POLL_S,
        "graceful_shutdown_timeout_s": scaling.replica_drain_timeout_s,
        "request_router_config": make_router(
            request_router_class="dist_vlm.launch.replica_router:AffinityRouter",
            request_router_kwargs={"block_size": config.cache.block_size},
            request_routing_stats_period_s=_REPORT_S,
            request_routing_stats_timeout_s=_REPORT_TIMEOUT_S,
        ),
        **number,
    }


def _cause_of(text: str) -> str:
    """The error's own words out of what Serve says around it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error" in line.partition(":")[0].rpartition(".")[2]]
    return (named[-1] if named else " ".join(lines))[-_LONGEST_CAUSE:]
