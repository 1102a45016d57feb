"""Servers as processes of their own on a loopback port, which tests kill and start again."""

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

from fireopd_jax.remote.client import Client
from fireopd_jax.remote.settings import ServedConfig
from fireopd_jax.text.tokenizer import byte_tokenizer


class Server:
    """A process that serves the model of a folder on one port; `command` ends in the options."""

    def __init__(self, folder, command):
        self.folder, self.command, self.process = folder, command, None
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.start()

    @property
    def log(self):
        return self.folder.parent / "serve.log"

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", *self.command, "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )

    def wait(self):
        """Wait until it listens."""
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def kill(self):
        self.process.kill()
        self.process.wait()

    def client(self, file, said, **settings):
        url = f"http://127.0.0.1:{self.port}/v1"
        settings = ServedConfig(url=url, model=str(self.folder), retries=300, **settings)
        return Client(settings, file, said, name="judge", sleep=lambda s: time.sleep(0.2))


@contextlib.contextmanager
def transformers_serve(parent):
    """A tiny random Llama behind `transformers serve`; skips where its packages are missing."""
    torch = pytest.importorskip("torch")
    for needed in ("fastapi", "accelerate"):
        pytest.importorskip(needed)
    transformers = pytest.importorskip("transformers")
    folder = parent / "model"
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=261, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
        bos_token_id=None, eos_token_id=257, pad_token_id=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    # The server takes the temperature of a request, but this from the model's folder.
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    code = "from transformers.cli.transformers import main; main()"
    options = ["--device", "cpu", "--host", "127.0.0.1"]
    server = Server(folder, [code, "serve", str(folder), *options])
    try:
        server.wait()
        yield server
    finally:
        server.kill()
