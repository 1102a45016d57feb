"""What XLA is told before JAX starts, by environment; knows nothing of JAX.

XLA reads its flags once, so these functions come first. A flag that the user has set stays.
"""

import os
import re
from importlib.metadata import entry_points
from importlib.util import find_spec

DEVICES, DEVICE_COUNT = "--xla_force_host_platform_device_count", 8
EFFORT = "--xla_backend_optimization_level"


def several_cpu_devices() -> None:
    """Ask for eight devices on the CPU where none, or one, is asked for.

    Other platforms do not look at it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.search(rf"{DEVICES}=(\d+)", flags)
    if asked and int(asked[1]) > 1:
        return
    others = re.sub(rf"{DEVICES}=\d+", "", flags).split()
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{DEVICES}={DEVICE_COUNT}"])


def compile_quickly_on_cpu() -> None:
    """Let LLVM stop at its first level where JAX can only find a CPU.

    The programs are as fast as at the third, XLA's default, and there in two thirds of the time.
    GPUs read the flag too, and would lose by it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if EFFORT not in flags and only_cpu():
        os.environ["XLA_FLAGS"] = f"{flags} {EFFORT}=1".strip()


def only_cpu() -> bool:
    """Tell whether JAX is bound to the CPU, or nothing is installed that would find more."""
    if asked := os.environ.get("JAX_PLATFORMS"):
        return asked == "cpu"
    plugins = entry_points(group="jax_plugins")
    return not plugins and find_spec("jax_plugins") is None and find_spec("libtpu") is None
