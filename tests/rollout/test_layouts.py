"""Which layout the KV cache has by default."""

import jax
import pytest

from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU
from fireopd_jax.rollout.layouts import AUTO, Auto, layout_of
from fireopd_jax.sharding.mesh import MeshConfig, make_mesh
from tests.cases import tiny_model

CONFIG = tiny_model(num_attention_heads=4, num_key_value_heads=2).config


@pytest.mark.parametrize(
    ("platform", "memory", "tensor", "wanted"),
    [
        ("cpu", AUTO, 1, Dense()),
        ("gpu", AUTO, 1, Dense()),
        ("tpu", AUTO, 1, PagedTPU()),
        ("tpu", AUTO, 2, PagedTPU()),
        ("tpu", AUTO, 4, Dense()),  # more devices than key heads
        ("tpu", Auto(dtype="int8"), 1, Dense(dtype="int8")),
        ("tpu", Dense(), 1, Dense()),
        ("tpu", Paged(page_size=32), 1, Paged(page_size=32)),
    ],
    ids=str,
)
def test_only_auto_depends_on_the_platform(platform, memory, tensor, wanted, monkeypatch):
    mesh = make_mesh(MeshConfig(tensor=tensor))
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert layout_of(memory, CONFIG, mesh) == wanted
