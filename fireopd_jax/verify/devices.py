"""Eight virtual devices for a machine that has one CPU; knows nothing of JAX."""

import os
import re

FLAG = "--xla_force_host_platform_device_count"
COUNT = 8


def several_cpu_devices() -> None:
    """Ask XLA for eight devices on the CPU where none, or one, is asked for.

    To be called before JAX starts: it reads the flag then. Other platforms do not look at it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked = re.search(rf"{FLAG}=(\d+)", flags)
    if asked and int(asked[1]) > 1:
        return
    others = re.sub(rf"{FLAG}=\d+", "", flags).split()
    os.environ["XLA_FLAGS"] = " ".join([*others, f"{FLAG}={COUNT}"])
