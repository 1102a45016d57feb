"""A running server: the socket, the worker and the HTTP server in their threads.

host, port -> bound -> socket ───────────┐
spec, params -> Engine, Scorer -> Worker ┴─> serving(...) -> Service, while the block runs
"""

import asyncio
import dataclasses
import socket
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn
from jax.sharding import Mesh

from fireopd_jax.config import UserError
from fireopd_jax.models.language_model import Params
from fireopd_jax.rollout.requests import Knobs, Request
from fireopd_jax.rollout.sampling import seed_for
from fireopd_jax.rollout.streaming import Engine
from fireopd_jax.serving.app import make_app
from fireopd_jax.serving.scorer import Scorer
from fireopd_jax.serving.service import Service
from fireopd_jax.serving.worker import Worker
from fireopd_jax.session.specs import ModelSpec
from fireopd_jax.text.chat import decode

CHUNK_STEPS = 32
"""Decoding steps between two looks for new requests."""
DEFAULT_CONTEXT = 4096
"""Longest prompt and response, in tokens, unless the model has fewer positions."""


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How a model is served."""

    name: str
    """Model id."""
    max_tokens: int | None = None
    """Longest prompt and response together; None: the model's positions, at most 4096."""
    slots: int | None = None
    """Responses that each replica decodes at a time; None: 32 on a CPU, 256 on other devices."""
    queue: int = 1024
    """Largest number of responses and scores that wait or are computed."""
    key: str | None = None
    """What clients must send as `Authorization: Bearer KEY`."""


@contextmanager
def serving(
    listener: socket.socket,
    spec: ModelSpec,
    params: Params,
    mesh: Mesh,
    options: ServeOptions,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[Service]:
    """Serve a model while the block runs; open requests get an error when it is left.

    The server listens, and the model is compiled, when the block begins. Raises UserError for a
    context beyond the model's positions.
    """
    context = context_of(spec, options.max_tokens)
    worker = make_worker(spec, params, mesh, options, context)
    service = Service(options.name, spec, worker, context, template_kwargs or {}, options.key)
    server = uvicorn.Server(
        uvicorn.Config(
            make_app(service),
            # uvicorn's own configuration would shut down all handlers of the process.
            log_config=None,
            log_level="warning",
            access_log=False,
            lifespan="off",
            ws="none",
            timeout_graceful_shutdown=5,
        )
    )
    thread = threading.Thread(
        target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True
    )
    worker.start()
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        if not server.started:
            raise UserError(f"{url_of(listener)}: the HTTP server did not start")
        yield service
    finally:
        worker.stop()
        server.should_exit = True
        thread.join()


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """Reserve an address for a block; nothing connects to it before the server listens.

    Raises UserError if the address cannot be used.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind)
    except OSError as error:
        raise UserError(f"--host {host}: no address of this machine ({error.strerror})") from error
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            raise UserError(
                f"{host}:{port}: cannot be listened on ({error.strerror}); expected an address of "
                "this machine and a free port (--port 0: any)"
            ) from error
        yield listener


def url_of(listener: socket.socket) -> str:
    """Return the URL that a bound socket is reached by, without the path of the API."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def context_of(spec: ModelSpec, wanted: int | None) -> int:
    """Return the longest prompt and response; raise UserError beyond the model's positions."""
    positions = spec.model.config.max_position_embeddings
    if wanted is None:
        return min(positions or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    if positions is not None and wanted > positions:
        raise UserError(
            f"--max-tokens {wanted}: the model has {positions} positions "
            "(max_position_embeddings); expected at most that"
        )
    return wanted


def make_worker(
    spec: ModelSpec, params: Params, mesh: Mesh, options: ServeOptions, context: int
) -> Worker:
    """Return a worker with an engine that is compiled, and has sampled a token."""
    engine = Engine(
        spec.model,
        width=context,
        room=context,
        context=context,
        seed=seed_for(0, "serve"),
        slots=options.slots,
        chunk_steps=CHUNK_STEPS,
        text=lambda tokens: decode(spec.tokenizer, tokens),
        mesh=mesh,
    )
    engine.load(params)
    engine.generate([Request(0, np.zeros(1, np.int32), Knobs(max_tokens=1))])
    return Worker(
        engine, Scorer(spec.model, params, mesh), options.queue, traceback.print_exception
    )
