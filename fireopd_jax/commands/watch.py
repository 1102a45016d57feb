"""`fireopd watch`: the page of a run that goes on, until SIGINT or SIGTERM."""

import time
from collections.abc import Sequence

from fireopd_jax.report.watching import WatchedPage, watching
from fireopd_jax.runtime.signals import stop_on_signal


def watch(runs: Sequence[str], port: int) -> None:
    """Serve the page of some runs on this machine, and print its address."""
    watched = WatchedPage(runs)
    with stop_on_signal() as stop, watching(watched, port) as address:
        print(f"{', '.join(runs)}: {address} (Ctrl-C ends it)", flush=True)
        while not stop:
            time.sleep(0.1)
