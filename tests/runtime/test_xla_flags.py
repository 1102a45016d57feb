"""XLA flags set through the environment."""

import pytest

from fireopd_jax.runtime import xla_flags


@pytest.fixture
def environ(monkeypatch):
    """Return `monkeypatch` with an environment without XLA flags or platform."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "--xla_force_host_platform_device_count=8"),
        ("--a=1", "--a=1 --xla_force_host_platform_device_count=8"),
        (
            "--xla_force_host_platform_device_count=1 --a=1",
            "--a=1 --xla_force_host_platform_device_count=8",
        ),
        (
            "--xla_force_host_platform_device_count=4",
            "--xla_force_host_platform_device_count=4",
        ),
    ],
)
def test_one_cpu_becomes_eight_devices(environ, given, expected):
    if given is not None:
        environ.setenv("XLA_FLAGS", given)
    xla_flags.several_cpu_devices()
    assert xla_flags.os.environ["XLA_FLAGS"] == expected


def flags_on(environ, platforms=None, given=None, plugins=(), modules=()):
    """Return the flags set on a machine with these packages installed."""
    for name, value in (("JAX_PLATFORMS", platforms), ("XLA_FLAGS", given)):
        if value is not None:
            environ.setenv(name, value)
    environ.setattr(xla_flags, "entry_points", lambda group: list(plugins))
    environ.setattr(xla_flags, "find_spec", lambda name: name if name in modules else None)
    xla_flags.compile_quickly_on_cpu()
    return xla_flags.os.environ.get("XLA_FLAGS")


LEVEL = "--xla_backend_optimization_level="


@pytest.mark.parametrize(
    "machine",
    [{}, {"platforms": "cpu", "plugins": ["cuda12"]}, {"platforms": "cpu", "modules": ["libtpu"]}],
)
def test_a_machine_with_only_a_cpu_compiles_quickly(environ, machine):
    assert flags_on(environ, **machine) == LEVEL + "1"


@pytest.mark.parametrize(
    "machine",
    [
        {"plugins": ["cuda12"]},
        {"modules": ["libtpu"]},
        {"modules": ["jax_plugins"]},
        {"platforms": "cuda"},
        {"platforms": "cuda,cpu"},
    ],
)
def test_where_an_accelerator_may_be_xla_keeps_its_level(environ, machine):
    assert flags_on(environ, **machine) is None


def test_the_users_own_flags_stay(environ):
    assert flags_on(environ, given=LEVEL + "3") == LEVEL + "3"
    assert flags_on(environ, given="--a=1") == f"--a=1 {LEVEL}1"
