"""`arr-fast serve`: one judge behind HTTP."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.markup import escape

from arr_fast.cli import options as opt
from arr_fast.cli.options import err_console
from arr_fast.errors import MissingDependencyError

RewardModeChoice = Literal["point", "group"]
ENVIRONMENT_TOKEN = "ARR_FAST_TOKEN"


@opt.takes_judge
def serve(
    choice: opt.JudgeChoice = opt.DEFAULT_JUDGE,
    rubric: opt.RubricName = None,
    host: Annotated[str, typer.Option(help="Address; loopback unless told otherwise.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free port.")] = 8077,
    token: Annotated[
        str | None,
        typer.Option(envvar=ENVIRONMENT_TOKEN, help="Bearer token that clients must send."),
    ] = None,
    max_batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Estimated tokens per call of the judge.")
    ] = None,
    max_wait_ms: Annotated[
        float | None, typer.Option(min=0.0, help="Wait for company, in milliseconds.")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(min=1, help="Requests that may wait; others get 429.")
    ] = None,
    image_cache_mb: Annotated[
        int | None, typer.Option(min=0, help="Budget of cached image features, in MiB.")
    ] = None,
    prefix_cache_mb: Annotated[
        int | None, typer.Option(min=0, help="Budget of cached text prefixes, in MiB.")
    ] = None,
    max_body_mb: Annotated[int | None, typer.Option(min=1, help="Longest body, in MiB.")] = None,
    allow_url: Annotated[
        list[str] | None,
        typer.Option(help="Prefix of image URLs that may be fetched; repeatable. None by default."),
    ] = None,
    reward_mode: Annotated[
        RewardModeChoice,
        typer.Option(help="Reward protocols: point, or group (images that share a prompt)."),
    ] = "point",
    pickle: Annotated[
        bool, typer.Option("--pickle", help="Serve flow_grpo's pickle protocol, on loopback.")
    ] = False,
    drain_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that accepted requests get after SIGTERM.")
    ] = 60.0,
    ray: Annotated[bool, typer.Option("--ray", help="Replicas behind Ray Serve.")] = False,
    replicas: Annotated[int, typer.Option(min=1, help="With --ray: replicas, or the least.")] = 1,
    max_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: scale up to this many with the load.")
    ] = None,
    gpus_per_replica: Annotated[
        float | None, typer.Option(min=0.0, help="With --ray: 0.5 shares a GPU; default 1 or 0.")
    ] = None,
    cpus_per_replica: Annotated[
        float, typer.Option(min=0.0, help="With --ray: cores that Ray reserves.")
    ] = 1.0,
    ray_address: Annotated[
        str | None, typer.Option(help="With --ray: a running cluster; default: one of our own.")
    ] = None,
) -> None:
    """Serve a judge over HTTP; API documentation at /docs."""
    with opt.one_line_errors():
        try:
            from arr_fast.serve.server import make_server
        except ImportError as error:
            if error.name not in ("fastapi", "uvicorn", "prometheus_client", "msgpack", "h11"):
                raise
            raise MissingDependencyError(str(error.name), "serve") from error
        from arr_fast.serve.settings import MAX_OPEN_BODY_BYTES, ServeSettings

        given: dict[str, Any] = {
            "max_batch_tokens": max_batch_tokens,
            "max_wait_ms": max_wait_ms,
            "max_queued_requests": max_queue,
        }
        if max_body_mb is not None:
            # Two of the longest bodies at once, or a second client would always be refused.
            held = max(MAX_OPEN_BODY_BYTES, 2 * max_body_mb << 20)
            given |= {"max_body_bytes": max_body_mb << 20, "max_open_body_bytes": held}
        settings = ServeSettings(
            host=host,
            port=port,
            token=token,
            rubric=_rubric(rubric),
            url_prefixes=tuple(allow_url or ()),
            reward_mode=reward_mode,
            pickle=pickle,
            drain_timeout_s=drain_timeout,
            **_given(given),
        )
        caches = _given(
            {
                "feature_cache_bytes": None if image_cache_mb is None else image_cache_mb << 20,
                "prefix_cache_bytes": None if prefix_cache_mb is None else prefix_cache_mb << 20,
            }
        )
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

        def announce() -> None:
            where = f"[bold]{escape(choice.model)}[/] at http://{host}:{port}"
            err_console.print(f"serving {where} (docs: /docs)")

        if ray:
            from arr_fast.serve import ray_serve

            scale = ray_serve.RayScale(
                replicas=replicas,
                max_replicas=max_replicas,
                gpus=gpus_per_replica,
                cpus=cpus_per_replica,
                address=ray_address,
            )
            ray_serve.run({**choice.arguments(), **caches}, settings, scale, announce)
            return
        judge = opt.load_judge(choice, **caches)
        announce()
        make_server(judge, settings).run()


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _rubric(name: str | None) -> Any:
    """A rubric from a file or the package; None for the packaged default of each task."""
    from arr_fast.rubric import Rubric

    if name is None:
        return None
    return Rubric.load(name) if Path(name).suffix else Rubric.builtin(name)
