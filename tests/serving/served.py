"""A tiny random model, and a server of it on a free loopback port, for the tests of this folder."""

import contextlib

import httpx
import jax

from fireopd_jax.models.hf_export import export_model
from fireopd_jax.recipe.models import ModelConfig
from fireopd_jax.serving.server import ServeOptions, bound, serving, url_of
from fireopd_jax.session.parameters import load_or_make
from fireopd_jax.session.specs import load_spec
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh, replicated
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer
from tests.cases import random_params, tiny_model

TOKENIZER = load_tokenizer(BUILTIN)
END = TOKENIZER.eos_token_id
MODEL = tiny_model(len(TOKENIZER), num_hidden_layers=2, max_position_embeddings=512)
PARAMS = jax.tree.map(lambda leaf: leaf * 1.5, random_params(MODEL))
CONTEXT = 300


def write_folder(to):
    """Write the model as a Hugging Face folder."""
    export_model(to, PARAMS, MODEL.config, TOKENIZER, stop=(END,), card="# a model\n")
    return to


@contextlib.contextmanager
def server(folder, **options):
    """Serve a folder; yield an HTTP client of it, and the service."""
    mesh = make_mesh(MeshConfig(data=1))
    spec = load_spec("model", folder, ModelConfig(path=str(folder)))
    params = load_or_make(spec, replicated(mesh))
    settings = ServeOptions(**{"name": "tiny", "max_tokens": CONTEXT, "slots": 6} | options)
    with (
        bound("127.0.0.1", 0) as listener,
        serving(listener, spec, params, mesh, settings) as service,
        httpx.Client(base_url=url_of(listener), timeout=120) as client,
    ):
        yield client, service


def ask(client, path="/v1/completions", **body):
    """Return the answer to a request, which must succeed."""
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client, path="/v1/completions", **body):
    """Return status and error of a request that must fail."""
    answer = client.post(path, json=body)
    assert answer.status_code >= 400, answer.text
    return answer.status_code, answer.json()["error"]
