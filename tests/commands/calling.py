"""The command line in this process, and a model's folder to call it with."""

import sys

import jax

from fireopd_jax import cli
from fireopd_jax.models.hf_export import export_model
from fireopd_jax.text.tokenizer import BUILTIN, load_tokenizer
from tests.cases import random_params

TOKENIZER = load_tokenizer(BUILTIN)


def call(monkeypatch, *arguments):
    """Run the command line in this process; return its exit status."""
    monkeypatch.setattr(sys, "argv", ["fireopd", *arguments])
    try:
        cli.main()
    except SystemExit as done:
        return done.code or 0
    return 0


def model_folder(tmp_path_factory, model):
    """Return a folder of Hugging Face with a random model that writes byte tokens."""
    to = tmp_path_factory.mktemp("model") / "hf"
    params = jax.tree.map(lambda leaf: leaf * 1.5, random_params(model))
    export_model(to, params, model.config, TOKENIZER, stop=(257,), card="# a model\n")
    return to
