"""Serve a checkpoint over HTTP; `python -m fave_fast.serve --ckpt model.pt`."""

from __future__ import annotations

import argparse
import functools
import ipaddress
import os
import socket
from collections.abc import Sequence
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
    from fave_fast.serving.service import Model

_BACKLOG = 2048  # connections that wait to be accepted


def _parser() -> cli.Parser:
    parser = cli.Parser("serve", "Serve recommendations from a checkpoint over HTTP.")
    whole = cli.whole_number
    parser.add_argument("--ckpt", metavar="FILE", required=True, help="checkpoint; read anew on SIGHUP or /v1/reload")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=whole(0), default=8000, help="port to listen on; 0: any free one")
    parser.add_argument(
        "--token-file", metavar="FILE", help="holds the bearer token; none: FAVE_FAST_TOKEN, or no token"
    )
    parser.add_argument("--topk", type=whole(1), default=20, help="length of a list where a request names none")
    parser.add_argument("--deny", metavar="FILE", help="item ids that nobody gets, one a line; read anew with --ckpt")
    parser.add_argument("--max-batch", type=whole(1), default=64, help="histories in one call of the engine")
    parser.add_argument("--max-queue", type=whole(1), default=1024, help="histories that may wait; more get 503")
    parser.add_argument("--max-topk", type=whole(1), default=200, help="limit of k in a request")
    parser.add_argument("--max-deny", type=whole(0), default=800, help="limit of denied items in a request")
    parser.add_argument("--max-histories", type=whole(1), default=256, help="limit of histories in a request")
    parser.add_argument("--max-history", type=whole(1), default=2000, help="limit of items in a history")
    parser.add_argument("--max-body", type=whole(1), default=1 << 20, help="limit of a request's body, in bytes")
    parser.add_argument("--drain-seconds", type=whole(0), default=0, help="to answer on, not ready, before a stop")
    parser.add_argument("--no-request-log", action="store_true", help="log no line for each request")
    cli.add_run_options(parser, "of weights and scores")
    cli.add_table_bytes_option(parser)
    return parser


def _load_model(arguments: argparse.Namespace) -> Model:
    """The checkpoint as it is now, ready to answer.

    Raises:
        InputError: it cannot be served.
    """
    from fave_fast.serving.service import Model

    checkpoint = checkpoints.load(arguments.ckpt)
    recommender = Recommender(
        checkpoint,
        device=cli.resolve_device(arguments.device),
        dtype=DTYPES[arguments.dtype],
        backend=arguments.backend,
        table_bytes=arguments.table_bytes,
    )
    recommender.warmup(arguments.topk, batches_up_to(arguments.max_batch))
    recommender.recommend([checkpoint.item_ids.take(np.zeros(1, np.int64))], arguments.topk)  # the first is the slowest
    return Model(checkpoints.content_digest(checkpoint), arguments.ckpt, recommender)


def _start_batcher(arguments: argparse.Namespace, engine: Engine) -> MicroBatcher:
    return MicroBatcher(
        engine,
        max_batch=arguments.max_batch,
        max_queue=arguments.max_queue,
        k=arguments.topk,
        deny=read_deny(arguments.deny) if arguments.deny else None,
    )


def _limits(arguments: argparse.Namespace) -> Limits:
    """The limits of a request, which must fit one another.

    Raises:
        InputError: they do not.
    """
    from fave_fast.serving.api import Limits

    if arguments.topk > arguments.max_topk:
        raise InputError(f"--topk is {arguments.topk}; expected no more than --max-topk, {arguments.max_topk}")
    if arguments.max_histories > arguments.max_queue:
        raise InputError(
            f"--max-histories is {arguments.max_histories}; expected no more than --max-queue, {arguments.max_queue}, "
            "for a request whose histories never all fit would always be refused"
        )
    return Limits(
        k=arguments.max_topk,
        deny=arguments.max_deny,
        histories=arguments.max_histories,
        history=arguments.max_history,
        body_bytes=arguments.max_body,
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    arguments = _parser().parse_args(argv)
    try:
        from fave_fast.serving.app import create_app
        from fave_fast.serving.server import run
        from fave_fast.serving.service import Service
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fave_fast"):
            raise
        raise InputError(f"{error.name} is not installed; expected pip install 'fave-fast[serve]'") from None
    limits, token = _limits(arguments), read_token(arguments.token_file)
    with _listen(arguments.host, arguments.port) as listener:
        service = Service(functools.partial(_load_model, arguments), functools.partial(_start_batcher, arguments))
        app = create_app(
            service, limits=limits, k=arguments.topk, token=token, log_requests=not arguments.no_request_log
        )
        address, port = listener.getsockname()[:2]
        where = f"http://{f'[{address}]' if ':' in address else address}:{port}"
        if token is None and not ipaddress.ip_address(address).is_loopback:
            cli.say(f"note: whoever reaches {where} may ask: there is no token")
        cli.say(f"serving {arguments.ckpt} on {where} (Ctrl-C or SIGTERM stops, SIGHUP reads the checkpoint anew)")
        run(app, service, listener, arguments.drain_seconds)
    return 0


if __name__ == "__main__":
    cli.run(main)
