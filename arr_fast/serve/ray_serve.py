"""`arr-fast serve --ray`: the same application in replicas, behind the proxy of Ray Serve.

Every replica loads a judge of its own and batches on its own; Ray places replicas on GPUs, starts
and stops them with the load, and replaces one that dies. Judging has no side effects, so a client
whose replica died sends its request again (`JudgeClient` does, see client.py) and sees one answer.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from arr_fast.errors import ArrFastError, MissingDependencyError
from arr_fast.serve.settings import ServeSettings, is_loopback

logger = logging.getLogger("arr_fast.serve")

APPLICATION = "arr-fast"


class RayScale(BaseModel):
    """How many replicas there are, and what each gets.

    Attributes:
        replicas: Replicas; with `max_replicas` the least of them.
        max_replicas: Most replicas; None keeps their number fixed.
        ongoing_per_replica: Requests per replica at which Ray adds one.
        gpus: GPUs of a replica; a fraction shares one. None: 1 where this machine has any, else 0.
        cpus: CPU cores of a replica.
        address: A running cluster ("auto", "ray://..."); None starts one on this machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    ongoing_per_replica: float = Field(default=16.0, gt=0.0)
    gpus: float | None = Field(default=None, ge=0.0)
    cpus: float = Field(default=1.0, ge=0.0)
    address: str | None = None

    @model_validator(mode="after")
    def _bounds_are_in_order(self) -> Self:
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"max_replicas {self.max_replicas} is under replicas {self.replicas}")
        return self

    def resources(self) -> dict[str, float]:
        """What Ray reserves for one replica."""
        return {"num_cpus": self.cpus, "num_gpus": gpus_or_default(self.gpus)}

    def options(self, settings: ServeSettings) -> dict[str, Any]:
        """Arguments of `serve.deployment`.

        Args:
            settings: Of the server; its queue bound is what a replica may hold at once, since a
                replica that is given one request at a time has nothing to batch.
        """
        options: dict[str, Any] = {
            "name": "judge",
            "ray_actor_options": self.resources(),
            "max_ongoing_requests": settings.max_queued_requests,
            "max_queued_requests": settings.max_queued_requests,
            "graceful_shutdown_timeout_s": settings.drain_timeout_s,
            "health_check_period_s": 5.0,
        }
        if self.max_replicas is None:
            return {**options, "num_replicas": self.replicas}
        scaling = {
            "min_replicas": self.replicas,
            "max_replicas": self.max_replicas,
            "target_ongoing_requests": self.ongoing_per_replica,
        }
        return {**options, "autoscaling_config": scaling}


def gpus_or_default(gpus: float | None) -> float:
    """A replica's GPUs where none were named: 1 if this machine has a GPU, else 0."""
    if gpus is not None:
        return gpus
    import torch

    return 1.0 if torch.cuda.is_available() else 0.0


def require_ray() -> None:
    """Raises a MissingDependencyError unless Ray Serve can be imported."""
    try:
        import ray.serve  # noqa: F401  (only whether it is there)
    except ImportError as error:
        raise MissingDependencyError("ray", "ray") from error


def connect(address: str | None, cpus: float) -> bool:
    """Joins a cluster, or starts one on this machine.

    Args:
        address: Of a running cluster; None starts one.
        cpus: Cores that a cluster of our own must have to lend, however many there are.

    Returns:
        False where this process was connected already, and `ray.shutdown` is somebody else's.
    """
    import ray

    if ray.is_initialized():
        return False
    own: dict[str, Any] = {}
    if address is None:
        own = {"num_cpus": max(1, math.ceil(cpus)) + 1, "include_dashboard": False}
    ray.init(address=address, namespace=APPLICATION, log_to_driver=False, **own)
    return True


def start(
    judge_options: Mapping[str, Any], settings: ServeSettings, scale: RayScale
) -> Callable[[], None]:
    """Starts the replicas and waits until they serve.

    Args:
        judge_options: Arguments of `Judge.from_pretrained`, `model` among them; every replica loads
            its own.
        settings: Address, limits and options; header and connection limits are Ray's own here.
        scale: Replicas and their resources.

    Returns:
        What stops them: replicas finish what they have accepted.

    Raises:
        MissingDependencyError: The extra `ray` is not installed.
        ArrFastError: The pickle protocol was asked for, or the replicas did not start.
    """
    # Ray gives its proxy 5 s to start, which a busy machine spends on imports alone.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    require_ray()
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions, ProxyLocation

    if settings.pickle:
        # Behind a proxy every client looks local, and local is all that guards this protocol.
        raise ArrFastError("the pickle protocol is not served through Ray; use msgpack")
    if not is_loopback(settings.host) and settings.token is None:
        logger.warning("%s is reachable from outside and no token is set", settings.host)
    # The controller and the proxy want no core, but replicas may outnumber the cores.
    mine = connect(scale.address, scale.cpus * (scale.max_replicas or scale.replicas))
    serve.start(
        proxy_location=ProxyLocation.EveryNode,
        http_options=HTTPOptions(host=settings.host, port=settings.port),
    )
    replica = serve.deployment(**scale.options(settings))(serve.ingress()(JudgeReplica))
    try:
        serve.run(replica.bind(dict(judge_options), settings), name=APPLICATION, route_prefix="/")
    except RuntimeError as error:
        raise ArrFastError(f"the replicas did not start: {error}") from error

    def stop() -> None:
        serve.delete(APPLICATION)
        if mine:
            serve.shutdown()
            ray.shutdown()

    return stop


def run(
    judge_options: Mapping[str, Any],
    settings: ServeSettings,
    scale: RayScale,
    on_ready: Callable[[], None],
) -> None:
    """Serves until SIGTERM or SIGINT, then lets the replicas finish.

    Args:
        judge_options, settings, scale: See `start`.
        on_ready: Called when the replicas serve.
    """
    stopping = threading.Event()

    def on_signal(_: int, __: FrameType | None) -> None:
        stopping.set()

    stop = start(judge_options, settings, scale)
    # Not before: ray.init puts handlers of its own in place.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    on_ready()
    stopping.wait()
    stop()


class JudgeReplica:
    """One replica: a judge, and the application around it.

    Args:
        judge_options: Arguments of `Judge.from_pretrained`.
        settings: Of the server.
    """

    def __init__(self, judge_options: dict[str, Any], settings: ServeSettings) -> None:
        from arr_fast.judge import Judge
        from arr_fast.serve.app import create_app

        self._app = create_app(Judge.from_pretrained(**judge_options), settings)

    def __serve_build_asgi_app__(self) -> Any:
        """What Ray Serve sends requests to."""
        return self._app

    def check_health(self) -> None:
        """Asked by Ray every few seconds; a replica whose engine thread died is replaced."""
        if not self._app.state.gateway.batcher.is_alive:
            raise ArrFastError("the engine thread has stopped")
