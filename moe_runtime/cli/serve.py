"""`moe-runtime serve`: an OpenAI-compatible HTTP server in front of a deployment."""

from __future__ import annotations

import argparse
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_runtime.cli.engine_args import (
    add_engine_arguments,
    add_model_arguments,
    llm_arguments,
    start_or_attach,
)
from moe_runtime.cli.parser_args import add_parser_arguments, parser_settings
from moe_runtime.cli.serve_ingress import check_serve_can, serve_behind_ray_serve
from moe_runtime.errors import ConfigError
from moe_runtime.signals import sigterm_as_exit

if TYPE_CHECKING:
    from moe_runtime.frontend import Frontend
    from moe_runtime.server.config import ServerConfig
    from moe_runtime.server.listener import Tls

_SHUTDOWN_TIMEOUT_S = 30.0
_UVICORN_LOG_LEVEL = "warning"


def add_parser(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("serve", help="serve a model over HTTP, with OpenAI's routes")
    add_model_arguments(parser)
    _add_server_arguments(parser.add_argument_group("server"))
    parser.add_argument(
        "--ingress",
        choices=("uvicorn", "serve"),
        default="uvicorn",
        help="who speaks HTTP: uvicorn in this process (default), or Ray Serve in replicas",
    )
    parser.add_argument(
        "--num-replicas", type=int, metavar="N", help="HTTP replicas of Ray Serve (default: 1)"
    )
    parser.add_argument("--name", help="of the deployment, which then outlives the server and may be shared")
    parser.add_argument("--connect", metavar="NAME", help="serve a named deployment that runs already")
    add_engine_arguments(parser)
    parser.set_defaults(func=run)


def _add_server_arguments(group: Any) -> None:
    add = group.add_argument
    add("--host", default="0.0.0.0", help="address to listen on (default: all of this machine's)")
    add("--port", type=int, default=8000, help="port to listen on; 0 takes a free one (default: 8000)")
    add(
        "--served-model-name", nargs="+", metavar="NAME", help="names that requests may give (default: MODEL)"
    )
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="key to ask for; may be given several times",
    )
    add("--api-key-file", metavar="PATH", help="file with a key a line")
    add(
        "--allowed-origins",
        nargs="+",
        default=[],
        metavar="ORIGIN",
        help="origins of browsers to let in (CORS)",
    )
    add("--chat-template", metavar="PATH", help="Jinja file to use instead of the checkpoint's chat template")
    add_parser_arguments(group)
    add("--per-expert-metrics", action="store_true", help="one series for each expert of each layer")
    add("--ray-metrics", action="store_true", help="show the metrics through Ray's, too")
    add("--max-body-bytes", type=int, metavar="N", help="bytes of a request's body")
    add("--max-concurrent-requests", type=int, metavar="N", help="requests at work before more are refused")
    add("--max-logprobs", type=int, metavar="N", help="logprobs that a request may ask for")
    add("--max-stop-strings", type=int, metavar="N", help="stop strings that a request may have")
    add(
        "--request-timeout",
        type=float,
        metavar="SECONDS",
        help="for a request and its answer; 0 for no limit",
    )
    add("--shutdown-timeout", type=float, metavar="SECONDS", help="to finish what is at work (default: 30)")
    add("--ssl-certfile", metavar="PATH", help="certificate for HTTPS")
    add("--ssl-keyfile", metavar="PATH", help="its key")
    add(
        "--uvicorn-log-level",
        choices=("critical", "error", "warning", "info", "debug", "trace"),
        help="info logs every request (default: warning)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from moe_runtime.async_llm import AsyncLLM
    from moe_runtime.server.app import make_app
    from moe_runtime.server.lifetime import serve_until_stopped
    from moe_runtime.server.listener import HttpServer, listen
    from moe_runtime.server.page_routes import page_router
    from moe_runtime.server.watching import watch

    # All that may be wrong is found before anything is started.
    config = _server_config(args)
    if args.ingress == "serve":
        return _run_ray_serve(args, config)
    if args.num_replicas is not None:
        raise ConfigError("--num-replicas is for --ingress serve; uvicorn serves from this process alone")
    tls = _tls(args)
    app = make_app(None, config, extra_routers=[page_router()])
    listener, timeout = listen(args.host, args.port), args.shutdown_timeout
    log_level = args.uvicorn_log_level or _UVICORN_LOG_LEVEL
    with sigterm_as_exit(), HttpServer(app, listener, tls=tls, log_level=log_level) as http:
        frontend = _start_engine(args)
        engine = AsyncLLM(frontend)
        metrics = watch(engine, config, per_expert=args.per_expert_metrics, to_ray=args.ray_metrics)
        try:
            serve_until_stopped(
                engine,
                metrics,
                app.state.server,
                http,
                ready_line=f"moe-runtime: serving {config.served_model_names[0]} at {http.url(args.host)}",
                shutdown_timeout_s=_SHUTDOWN_TIMEOUT_S if timeout is None else timeout,
            )
        finally:
            metrics.close()
            frontend.close()
    return 0


def _run_ray_serve(args: argparse.Namespace, config: ServerConfig) -> int:
    """With --ingress serve."""
    for flag, is_given in (
        ("--ssl-certfile", args.ssl_certfile or args.ssl_keyfile),
        ("--ray-metrics", args.ray_metrics),
        ("--shutdown-timeout", args.shutdown_timeout is not None),
        ("--uvicorn-log-level", args.uvicorn_log_level is not None),
    ):
        if is_given:
            raise ConfigError(f"{flag} is for --ingress uvicorn; Ray Serve's replicas do not take it")
    num_replicas = 1 if args.num_replicas is None else args.num_replicas
    check_serve_can(host=args.host, port=args.port, num_replicas=num_replicas)
    with sigterm_as_exit():
        frontend = _start_engine(args)
        try:
            serve_behind_ray_serve(
                frontend,
                config,
                host=args.host,
                port=args.port,
                num_replicas=num_replicas,
                per_expert=args.per_expert_metrics,
            )
        finally:
            frontend.close()
    return 0


def _start_engine(args: argparse.Namespace) -> Frontend:
    from moe_runtime.deployment import DRIVER

    name, keeper = args.name, None
    if name is None and args.ingress == "serve":  # whose replicas find the ranks by a name
        name, keeper = f"serve-{secrets.token_hex(4)}", DRIVER
    return start_or_attach(args, name=name, keeper=keeper)


def _server_config(args: argparse.Namespace) -> ServerConfig:
    from moe_runtime.config import EngineConfig
    from moe_runtime.server.config import ServerConfig, find_api_keys, read_setting

    given = llm_arguments(args)
    engine_arguments = {
        name: value for name, value in given.items() if name not in ("revision", "model_class")
    }
    engine_arguments.pop("model")
    if args.connect is not None and (engine_arguments or args.model or args.name):
        raise ConfigError(
            "--connect serves a deployment as it runs; leave out MODEL, --name and the deployment's flags"
        )
    EngineConfig.from_kwargs(engine_arguments)
    if args.shutdown_timeout is not None and not args.shutdown_timeout >= 0:
        raise ConfigError(f"--shutdown-timeout must be at least 0 seconds, got {args.shutdown_timeout}")
    model = args.model or args.connect or "demo"
    settings = {
        "max_body_bytes": args.max_body_bytes,
        "max_concurrent_requests": args.max_concurrent_requests,
        "max_logprobs": args.max_logprobs,
        "max_stop": args.max_stop_strings,
    }
    given_settings = {name: value for name, value in settings.items() if value is not None}
    if args.request_timeout is not None:
        given_settings["request_timeout_s"] = args.request_timeout or None
    return ServerConfig(
        served_model_names=tuple(args.served_model_name or [model]),
        model_root=model,
        api_keys=find_api_keys(args.api_key, args.api_key_file, "--api-key-file"),
        allowed_origins=tuple(args.allowed_origins),
        chat_template=read_setting(args.chat_template, "--chat-template"),
        **parser_settings(args),
        **given_settings,
    )


def _tls(args: argparse.Namespace) -> Tls | None:
    from moe_runtime.server.listener import Tls

    if not args.ssl_certfile and not args.ssl_keyfile:
        return None
    for flag, path in (("--ssl-certfile", args.ssl_certfile), ("--ssl-keyfile", args.ssl_keyfile)):
        if not path or not Path(path).is_file():
            raise ConfigError(f"HTTPS needs {flag} to name a file, got {path!r}")
    return Tls(certificate=args.ssl_certfile, key=args.ssl_keyfile)
