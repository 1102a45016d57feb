"""What a user sees of a run that is stopped, refused or broken off, and what is left of it.

Interrupted, KeyboardInterrupt -> how to go on
UserError of a new run -> no folder is left
"""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager

from fireopd_jax.config import UserError
from fireopd_jax.runs.folder import RunFolder
from fireopd_jax.runtime.signals import Interrupted

NEXT = "fireopd resume"


@contextmanager
def resumable(folder: RunFolder) -> Iterator[None]:
    """Raise `Interrupted`, with the command that goes on, for what stops the block.

    A new folder is removed again if the block is refused before it has computed anything.
    """
    try:
        yield
    except (Interrupted, KeyboardInterrupt) as stopped:
        reason = str(stopped) or "interrupted"
        if NEXT not in reason:
            reason += f"; go on with: {NEXT} {shlex.quote(str(folder.path))}"
        raise Interrupted(reason) from None
    except UserError:
        folder.discard_unused()
        raise
