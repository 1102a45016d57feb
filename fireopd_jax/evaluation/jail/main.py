"""The launcher: for every program a process that isolates itself and runs its tests.

    [orders {program, limits, isolation} -> fork -> isolate -> {} | {refused}
                                             [request -> outcome] -> END -> END]

The launcher lives as long as its caller, so that a program costs a fork and not a start of Python.
It never runs a program itself, nor does it leave its namespaces.
"""

import gc
import os
import signal
from typing import Any, NoReturn

from . import frames, landlock, linux, namespaces, seccomp
from .confinement import Confinement
from .supervisor import Forked, Job, Orphaned, Supervisor, Unconfined

ORDERS, OUTCOMES = 0, 1
END = "end"


def main() -> Job:
    """Serve programs, one after the other; return only in a child, with what it has to do."""
    gc.freeze()  # Children share these pages; a collection in them would copy them all.
    try:
        while True:
            orders = frames.read_frame(ORDERS)
            guard = os.fork()
            if not guard:
                _serve(orders)
            _, status = os.waitpid(guard, 0)
            if status:  # The end that the caller will ask for has not been read.
                frames.write_frame(OUTCOMES, {"ended": status})
                while frames.read_frame(ORDERS) != END:
                    pass
            frames.write_frame(OUTCOMES, END)
    except Forked as child:
        return child.job
    except (frames.Ended, BrokenPipeError):
        os._exit(0)


def _serve(orders: dict[str, Any]) -> NoReturn:
    """Run the tests of one program until the caller wants no more."""
    try:
        if linux.LINUX:
            linux.prctl(linux.PARENT_DEATH_SIGNAL, signal.SIGKILL)
        supervisor = _isolated(orders)
        while (request := frames.read_frame(ORDERS)) != END:
            frames.write_frame(OUTCOMES, supervisor.run(request))
        os._exit(0)
    except Unconfined as error:
        frames.write_frame(OUTCOMES, {"unconfined": str(error)})
        os._exit(1)
    except (frames.Ended, Orphaned, BrokenPipeError):
        os._exit(1)


def _isolated(orders: dict[str, Any]) -> Supervisor:
    """Isolate this process as ordered, or report why not and end."""
    kind, packages, uid = orders["isolation"], orders["packages"], None
    readable = (*namespaces.python_folders(), *namespaces.package_folders(packages))
    try:
        if linux.LINUX:
            _prefer_out_of_memory()
        if kind == "namespaces":
            uid = namespaces.enter(readable)
        elif kind == "filters" and not (seccomp.available() and landlock.version()):
            raise OSError("this kernel has no Landlock, or this processor is not known")
    except OSError as error:
        frames.write_frame(OUTCOMES, {"refused": f"{kind}: {error}"})
        os._exit(1)
    confinement = Confinement(
        namespaces=kind == "namespaces",
        seccomp=seccomp.available() and orders["seccomp"],
        readable=(*readable, *namespaces.DEVICES) if kind == "filters" else None,
        uid=uid,
        **orders["resources"],
    )
    frames.write_frame(OUTCOMES, {})
    return Supervisor(
        program=orders["program"],
        confinement=confinement,
        packages=packages,
        clock_s=orders["clock_s"],
        output_bytes=orders["output_bytes"],
        owner=ORDERS,
    )


def _prefer_out_of_memory() -> None:
    """Make programs, not the training, the first that the kernel ends without memory."""
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
