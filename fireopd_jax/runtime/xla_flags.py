"""XLA flags, set in the environment before JAX starts; this module does not import JAX.

XLA reads its flags once, so call these functions first. A flag that the user has set is kept.
"""

import os
import re
from importlib.metadata import entry_points
from importlib.util import find_spec

DEVICES, DEVICE_COUNT = "--xla_force_host_platform_device_count", 8
EFFORT = "--xla_backend_optimization_level"


def several_cpu_devices() -> None:
    """Set eight virtual CPU devices, unless the user has set more than one.

    Other platforms ignore the flag.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.search(rf"{DEVICES}=(\d+)", flags)
    if asked and int(asked[1]) > 1:
        return
    others = re.sub(rf"{DEVICES}=\d+", "", flags).split()
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{DEVICES}={DEVICE_COUNT}"])


def compile_quickly_on_cpu() -> None:
    """Set LLVM's optimization level to 1 if JAX can only find a CPU.

    Programs run as fast as at level 3, XLA's default, and compile in two thirds of the time. On
    GPUs the flag takes effect too and would cost speed, so it is not set there.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if EFFORT not in flags and only_cpu():
        os.environ["XLA_FLAGS"] = f"{flags} {EFFORT}=1".strip()


def only_cpu() -> bool:
    """Return whether JAX is limited to the CPU, or no plugin for another platform is installed."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    plugins = entry_points(group="jax_plugins")
    return not plugins and find_spec("jax_plugins") is None and find_spec("libtpu") is None
