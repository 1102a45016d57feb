"""`fireopd serve`: a model behind an OpenAI-compatible HTTP API, until SIGINT or SIGTERM.

a run, a folder or a hub's name -> parameters, tokenizer -> `serving` -> answers
"""

import dataclasses
import os
import sys
import time
from typing import Literal

from fireopd_jax.config import UserError
from fireopd_jax.runtime.compilation import compile_cache
from fireopd_jax.runtime.signals import stop_on_signal
from fireopd_jax.session.opening import open_any
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicated

KEY = "FIREOPD_SERVE_KEY"
"""Environment variable of the key that clients must send."""
LOOPBACK = ("127.", "::1", "localhost")


@dataclasses.dataclass(frozen=True)
class ServeCommand:
    """Arguments of the command; their meaning is in its help."""

    model: str
    name: str
    host: str
    port: int
    model_id: str | None
    max_tokens: int | None
    slots: int | None
    queue: int
    chat_template: str | None
    dtype: Literal["float32", "bfloat16"] | None
    tensor: int
    ignore_config_keys: tuple[str, ...]

    def run(self) -> None:
        """Load the model, print the URL when it listens, and serve until a signal.

        Raises UserError for an unknown model, an address in use, or packages that are missing.
        """
        try:
            from fireopd_jax.serving.server import ServeOptions, bound, serving, url_of
        except ModuleNotFoundError as error:
            raise UserError(
                f'fireopd serve needs {error.name}: pip install "fireopd-jax[served]"'
            ) from error
        key = os.environ.get(KEY) or None
        if key is None and not self.host.startswith(LOOPBACK):
            print(
                f"fireopd: --host {self.host} lets other machines in, without a key: set {KEY}",
                file=sys.stderr,
            )
        compile_cache()
        with stop_on_signal() as stop, bound(self.host, self.port) as listener:
            mesh = make_mesh(MeshConfig(tensor=self.tensor))
            spec, params, template_kwargs = open_any(
                self.model,
                self.name,
                self.dtype,
                replicated(mesh),
                self.ignore_config_keys,
                self.chat_template,
            )
            print(f"fireopd: {self.model} is loaded, now it is compiled", file=sys.stderr)
            options = ServeOptions(
                name=self.model_id or self.model,
                max_tokens=self.max_tokens,
                slots=self.slots,
                queue=self.queue,
                key=key,
            )
            with serving(listener, spec, params, mesh, options, template_kwargs) as service:
                print(
                    f"{service.name} is served at {url_of(listener)}/v1 "
                    f"({service.context} tokens of context)",
                    flush=True,
                )
                while not stop:
                    time.sleep(0.1)
