"""Serve a checkpoint over HTTP; `python -m fave_fast.serve --ckpt model.pt`."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fave_fast import checkpoint as checkpoints
from fave_fast import cli
from fave_fast.batching import Engine, MicroBatcher
from fave_fast.engine import Recommender
from fave_fast.errors import InputError
from fave_fast.graphs import batches_up_to
from fave_fast.infer import read_deny
from fave_fast.model import DTYPES

if TYPE_CHECKING:
    from fave_fast.serving.api import Limits
    from fave_fast.serving.gateway import Gateway
    from fave_fast.serving.service import Model, Service

_BACKLOG = 2048  # connections that wait to be accepted


@dataclass(frozen=True)
class Options:
    """What is served and what a request may ask for, wherever it listens: the command's options of the same names."""

    ckpt: str
    token_file: str | None = None
    topk: int = 20
    deny: str | None = None
    max_batch: int = 64
    max_queue: int = 1024
    max_topk: int = 200
    max_deny: int = 800
    max_histories: int = 256
    max_history: int = 2000
    max_body: int = 1 << 20
    device: str = "auto"
    dtype: str = "fp32"
    backend: str = "auto"
    table_bytes: bool = False


def _parser() -> cli.Parser:
    parser = cli.Parser("serve", "Serve recommendations from a checkpoint over HTTP.")
    whole = cli.whole_number
    parser.add_argument("--ckpt", metavar="FILE", required=True, help="checkpoint; read anew on SIGHUP or /v1/reload")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=whole(0), default=8000, help="port to listen on; 0: any free one")
    parser.add_argument(
        "--token-file", metavar="FILE", help="holds the bearer token; none: FAVE_FAST_TOKEN, or no token"
    )
    parser.add_argument(
        "--topk", type=whole(1), default=Options.topk, help="length of a list where a request names none"
    )
    parser.add_argument("--deny", metavar="FILE", help="item ids that nobody gets, one a line; read anew with --ckpt")
    parser.add_argument(
        "--max-batch", type=whole(1), default=Options.max_batch, help="histories in one call of the engine"
    )
    parser.add_argument(
        "--max-queue", type=whole(1), default=Options.max_queue, help="histories that may wait; more get 503"
    )
    parser.add_argument("--max-topk", type=whole(1), default=Options.max_topk, help="limit of k in a request")
    parser.add_argument(
        "--max-deny", type=whole(0), default=Options.max_deny, help="limit of denied items in a request"
    )
    parser.add_argument(
        "--max-histories", type=whole(1), default=Options.max_histories, help="limit of histories in a request"
    )
    parser.add_argument("--max-history", type=whole(1), default=Options.max_history, help="limit of items in a history")
    parser.add_argument(
        "--max-body", type=whole(1), default=Options.max_body, help="limit of a request's body, in bytes"
    )
    parser.add_argument("--drain-seconds", type=whole(0), default=0, help="to answer on, not ready, before a stop")
    parser.add_argument("--no-request-log", action="store_true", help="log no line for each request")
    cli.add_run_options(parser, "of weights and scores")
    cli.add_table_bytes_option(parser)
    return parser


def _load_model(options: Options) -> Model:
    """The checkpoint as it is now, ready to answer.

    Raises:
        InputError: it cannot be served.
    """
    from fave_fast.serving.service import Model

    checkpoint = checkpoints.load(options.ckpt)
    recommender = Recommender(
        checkpoint,
        device=cli.resolve_device(options.device),
        dtype=DTYPES[options.dtype],
        backend=options.backend,
        table_bytes=options.table_bytes,
    )
    recommender.warmup(options.topk, batches_up_to(options.max_batch))
    recommender.recommend([checkpoint.item_ids.take(np.zeros(1, np.int64))], options.topk)  # the first is the slowest
    return Model(checkpoints.content_digest(checkpoint), options.ckpt, recommender)


def _start_batcher(options: Options, engine: Engine) -> MicroBatcher:
    return MicroBatcher(
        engine,
        max_batch=options.max_batch,
        max_queue=options.max_queue,
        k=options.topk,
        deny=read_deny(options.deny) if options.deny else None,
    )


def limits_of(options: Options) -> Limits:
    """The limits of a request, which must fit one another.

    Raises:
        InputError: they do not.
    """
    from fave_fast.serving.api import Limits

    if options.topk > options.max_topk:
        raise InputError(f"--topk is {options.topk}; expected no more than --max-topk, {options.max_topk}")
    if options.max_histories > options.max_queue:
        raise InputError(
            f"--max-histories is {options.max_histories}; expected no more than --max-queue, {options.max_queue}, "
            "for a request whose histories never all fit would always be refused"
        )
    return Limits(
        k=options.max_topk,
        deny=options.max_deny,
        histories=options.max_histories,
        history=options.max_history,
        body_bytes=options.max_body,
    )


def read_token(path: str | None) -> str | None:
    """The bearer token from a file, or from FAVE_FAST_TOKEN, or None: whoever reaches the server may ask.

    Raises:
        InputError: the file cannot be read, or the token is empty or holds more than visible ASCII.
    """
    if path is None:
        token, where = os.environ.get("FAVE_FAST_TOKEN"), "FAVE_FAST_TOKEN"
        if token is None:
            return None
    else:
        where = path
        try:
            token = Path(path).read_text(encoding="ascii").strip()
        except OSError as error:
            raise InputError(f"{path}: cannot read the token: {error.strerror}") from None
        except UnicodeDecodeError:
            token = ""
    if not token or not all("!" <= letter <= "~" for letter in token):
        raise InputError(f"{where}: holds no token; expected visible ASCII without blanks")
    return token


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OverflowError:
        raise InputError(f"--port is {port}; expected at most 65535") from None
    except OSError as error:
        reason = str(error.strerror).split(" (while")[0]  # after which the address comes once more
        raise InputError(f"cannot listen on {host}, port {port}: {reason}") from None


def open_app(
    options: Options, *, reloadable: bool = True, log_requests: bool = True, labels: Mapping[str, str] | None = None
) -> tuple[Gateway, Service]:
    """Load the model; returns the app over it, which listens nowhere yet, and what is behind it.

    Args:
        options: of the server.
        reloadable: with a token, `POST /v1/reload` is there.
        log_requests: write a line for each request.
        labels: of every metric, beside its own.

    Raises:
        InputError: options that do not fit, a token that cannot be read, or a checkpoint that cannot be served.
    """
    from fave_fast.serving.app import create_app
    from fave_fast.serving.service import Service

    limits, token = limits_of(options), read_token(options.token_file)
    service = Service(functools.partial(_load_model, options), functools.partial(_start_batcher, options))
    app = create_app(
        service,
        limits=limits,
        k=options.topk,
        token=token,
        reloadable=reloadable,
        log_requests=log_requests,
        labels=labels,
    )
    return app, service


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        from fave_fast.serving.server import run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fave_fast"):
            raise
        raise InputError(f"{error.name} is not installed; expected pip install 'fave-fast[serve]'") from None
    options = Options(**{field.name: getattr(arguments, field.name) for field in fields(Options)})
    with _listen(arguments.host, arguments.port) as listener:
        app, service = open_app(options, log_requests=not arguments.no_request_log)
        address, port = listener.getsockname()[:2]
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        if app.token is None and not ipaddress.ip_address(address).is_loopback:
            cli.say(f"note: whoever reaches {where} may ask: there is no token")
        cli.say(f"serving {options.ckpt} on {where} (Ctrl-C or SIGTERM stops, SIGHUP reads the checkpoint anew)")
        run(app, service, listener, arguments.drain_seconds)
    return 0


if __name__ == "__main__":
    cli.run(main)
