"""Several processes that are one run, as on the hosts of a TPU pod: JAX's own runtime joins them.

    join(True) -> JAX's coordination service -> process 0 leads, the others follow

Every process runs the same program on the same configuration and rows, and each step's arrays are
sharded over the devices of all. What depends on time, files or memory is decided by the leader
(`by_leader`), what any of them may see, such as a signal, by all (`any_of_all`). Only the leader
writes files and prints; checkpoints are written by all, and read by all, from one file system.

A process that ends takes the others with it: after `HEARTBEAT_S` without a sign of life, or at its
end without the others', the service ends them all. This module imports JAX on use only.
"""

import contextlib
import os
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from fireopd_jax.config import UserError

Value = TypeVar("Value")
HEARTBEAT_S = 30
JOIN_S = 300
"""Seconds in which all processes must have started."""
ADDRESS, COUNT, RANK = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Variables that say what no launcher says: host:port of process 0, how many there are, which."""

_rank, _count = 0, 1


class Followed(UserError):
    """An error of the leader, which prints it: the other processes end without another word."""


def rank() -> int:
    """Return the number of this process, from 0."""
    return _rank


def count() -> int:
    """Return the number of processes of this run."""
    return _count


def leads() -> bool:
    """Return whether this process writes the files of the run, and prints."""
    return _rank == 0


def join(distributed: bool) -> None:
    """Join the other processes of this run, if it is `distributed`; the followers become silent.

    Addresses are those of the launcher (Cloud TPU, Slurm, GKE, Open MPI), or of the variables
    `ADDRESS`, `COUNT` and `RANK`. Raises UserError where these are missing or no number, and where
    JAX cannot start; a process that waits for others in vain ends. Call it before JAX is used.
    """
    global _rank, _count
    if not distributed:
        return
    import jax

    given = _given(os.environ)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of CPU devices only
    waiting = threading.Timer(JOIN_S, _give_up, [given])
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            **given,
            initialization_timeout=2 * JOIN_S,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=HEARTBEAT_S,
        )
    except ValueError as error:
        raise UserError(
            f"--distributed: no launcher says how many processes there are ({error}); expected "
            f"Cloud TPU, Slurm, GKE or Open MPI, or the variables {ADDRESS}, {COUNT} and {RANK}"
        ) from error
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"--distributed: cannot join the other processes: {reason}") from error
    finally:
        waiting.cancel()
    _rank, _count = jax.process_index(), jax.process_count()
    if not leads():
        _silence()


def _give_up(given: Mapping[str, Any]) -> None:
    """End the process with one line, in a thread, before JAX aborts it with a native stack."""
    which, where = "this process", "the launcher's addresses"
    if given:
        which = f"process {given['process_id']} of {given['num_processes']}"
        where = f"process 0 at {given['coordinator_address']}"
    line = f"fireopd: --distributed: {which} waited {JOIN_S} s for the others; expected all "
    with contextlib.suppress(OSError, ValueError):
        print(f"{line}to start within that time, and to reach {where}", file=sys.stderr, flush=True)
    os._exit(2)


def _given(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return what the variables say; nothing if there are none."""
    named = [name for name in (ADDRESS, COUNT, RANK) if variables.get(name)]
    if not named:
        return {}
    found: dict[str, Any] = {}
    keys = {ADDRESS: "coordinator_address", COUNT: "num_processes", RANK: "process_id"}
    for name, key in keys.items():
        value = variables.get(name, "")
        if not value:
            raise UserError(f"{name}: missing; expected it beside {', '.join(named)}")
        if name != ADDRESS and not value.isdecimal():
            raise UserError(f"{name}={value}: expected a whole number")
        found[key] = value if name == ADDRESS else int(value)
    if found["process_id"] >= found["num_processes"]:
        raise UserError(
            f"{RANK}={found['process_id']}: expected a number below {COUNT}="
            f"{found['num_processes']}; the first process has 0"
        )
    host, colon, port = found["coordinator_address"].rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise UserError(f"{ADDRESS}={found['coordinator_address']}: expected host:port")
    return found


def _silence() -> None:
    """Print nothing any more; errors of this process alone still reach its standard error."""
    sys.stdout.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    sys.stdout = sys.stderr = os.fdopen(nowhere, "w", encoding="utf-8")


def complain(text: str) -> None:
    """Print an error of a follower, which otherwise prints nothing, with its number."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(f"process {_rank}: {text}", file=sys.__stderr__, flush=True)


def by_leader(decide: Callable[[], Value]) -> Value:
    """Return what `decide` returns in process 0, which alone calls it, in every process.

    A UserError that it raises is raised in every process. The value must be small, and picklable.
    """
    if _count == 1:
        return decide()
    if leads():
        try:
            value = decide()
        except UserError as error:
            _broadcast(pickle.dumps((False, str(error))))
            raise
        _broadcast(pickle.dumps((True, value)))
        return value
    fine, value = pickle.loads(_broadcast(b""))
    if not fine:
        raise Followed(value)
    return value


def wait_for_leader() -> None:
    """Wait until process 0 is here, too: it may be writing what the others do not."""
    by_leader(lambda: None)


def any_of_all(here: bool) -> bool:
    """Return whether `here` is true in any process; each must call it at the same places."""
    if _count == 1:
        return here
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(here))))


def gathered(text: bytes) -> list[bytes]:
    """Return the bytes of every process, by its number."""
    if _count == 1:
        return [text]
    import numpy as np
    from jax.experimental import multihost_utils

    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(text))))
    own = np.zeros(int(sizes.max()), np.uint8)
    own[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(own))
    return [row[:size].tobytes() for row, size in zip(rows, sizes.tolist(), strict=True)]


def fetched(tree: Any) -> Any:
    """Return the arrays of a tree on the host, whole, in every process."""
    import jax

    if _count == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    def whole(x: Any) -> Any:
        if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
            return jax.device_get(x)
        return multihost_utils.process_allgather(x, tiled=True)

    return jax.tree.map(whole, tree)


def _broadcast(text: bytes) -> bytes:
    """Return the bytes of process 0."""
    import numpy as np
    from jax.experimental import multihost_utils

    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    own = np.zeros(size, np.uint8)
    if leads():
        own[:] = np.frombuffer(text, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(own)).astype(np.uint8).tobytes()
