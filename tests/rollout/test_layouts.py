"""Which layout the KV cache has by default."""

import jax
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.rollout.kv_dense import Dense
from fireopd_jax.rollout.kv_paged import Paged
from fireopd_jax.rollout.kv_paged_tpu import PagedTPU
from fireopd_jax.rollout.layouts import AUTO, Auto, layout_of
from fireopd_jax.rollout.state import Shape
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
    assert layout_of(memory, CONFIG, mesh, 4096) == wanted


def test_pages_are_as_large_as_the_kernels_table_needs(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for slots, positions, page in ((None, 18_432, 64), (None, 40_000, 128), (1024, 131_072, 2048)):
        memory = layout_of(AUTO, CONFIG, None, positions, slots)
        assert memory == PagedTPU(page_size=page)
        shape = Shape.of(2048, 1024, positions - 1024, slots, memory.align)
        assert jax.eval_shape(lambda memory=memory, shape=shape: memory.init(CONFIG, shape))
    small = Shape.of(2048, 1024, 39_000, None, 16)
    with pytest.raises(UserError, match=r"page_size=16: the page table of 256 .* expected 128"):
        PagedTPU(page_size=16).init(CONFIG, small)
