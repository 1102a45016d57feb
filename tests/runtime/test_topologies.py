"""Names of topologies, and the devices that programs are made for."""

import types

import jax
import pytest

from fireopd_jax.config import UserError
from fireopd_jax.runtime import topologies
from fireopd_jax.runtime.target import devices, made_for, platform
from fireopd_jax.runtime.topologies import CHIPS, TARGETS, find_topology, slice_of


@pytest.mark.parametrize(
    ("kind", "shape", "slice"),
    [
        ("v5e", [8], (2, 4)), ("v5e", [1], (2, 2)), ("v6e", [16], (4, 4)), ("v6e", [4, 8], (4, 8)),
        ("v5p", [4], (2, 2, 1)), ("v5p", [8], (2, 2, 2)), ("v5p", [16], (2, 2, 4)),
        ("v5p", [32], (2, 4, 4)), ("v5p", [64], (4, 4, 4)), ("v5p", [128], (4, 4, 8)),
        ("v4", [2, 2, 1], (2, 2, 1)),
    ],
)  # fmt: skip
def test_a_count_is_the_smallest_slice(kind, shape, slice):
    assert slice_of(kind, shape) == slice


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("v5q:8", r"expected KIND:COUNT .*\(did you mean 'v5"),
        ("v5p", "expected v5p:COUNT"),
        ("v5p:0", "expected v5p:COUNT"),
        ("v5p:4x", "expected v5p:COUNT"),
        ("v5p:-4", "expected v5p:COUNT"),
        ("v5p:99999", "expected v5p:COUNT"),
        ("v5p:64x64x64", "262,144 devices; at most 4,096"),
        ("v6e:2x2x2", "v6e has 2 axes, such as v6e:4x4"),
    ],
)
def test_names_that_are_none_are_one_line(name, words):
    with pytest.raises(UserError, match=words) as caught:
        find_topology(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["v5p:8", "h100:8"])
def test_a_compiler_that_is_not_installed_is_named(name, monkeypatch):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r'needs .*pip install "fireopd-jax\[aot\]"'):
        find_topology(name)


def test_every_gpu_has_a_description():
    for name, chip in CHIPS.items():
        assert (chip.platform != "gpu") or (TARGETS / f"{name}.textproto").is_file()
        assert chip.gib > 1 and chip.flops > 1e14 and chip.bandwidth > 1e11


def test_the_devices_of_this_process_are_the_default():
    found = find_topology(None)
    assert len(found.devices) == jax.device_count() and found.bytes > 0
    assert found.name.startswith("cpu:") and found.chip is None


def test_programs_may_be_made_for_other_devices():
    assert platform() == "cpu" and devices() == jax.devices()
    for given, named in (("tpu", "tpu"), ("cuda", "gpu")):
        other = types.SimpleNamespace(platform=given)
        with made_for([other]):
            assert platform() == named and devices() == (other,)
    assert platform() == "cpu"
