"""The entry point `fireopd`.

    app -> UserError, OSError, Interrupted -> one line on stderr and an exit status

Exit status: 0 done; 1 an error of ours, or output that could not be written; 2 an error of the
user's, or of the user's disk; 130 interrupted; 141 nobody reads the output any more.
"""

import errno
import os
import re
import sys
import traceback
from pathlib import Path

# The order is that of the help.
from fireopd_jax.cli import machine, models, serving, training  # noqa: F401
from fireopd_jax.cli.app import app
from fireopd_jax.config import UserError
from fireopd_jax.runtime.processes import Followed, complain, leads
from fireopd_jax.runtime.signals import Interrupted
from fireopd_jax.terminal.streams import OutputLost, flush_streams, guarded_streams

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# transformers is used for tokenizers only; silence its warning that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

FOR_FILES = ("train", "sft", "resume", "export", "report", "watch", "serve", "chat")
"""Commands whose output is a report: what they are for is in files, or answered elsewhere."""
LONGEST_WORD, SHOWN = 500, 40
"""Characters of a word in an error, such as a path or a value, and those of its ends."""
OF_MACHINE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO, errno.ESTALE),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.ENAMETOOLONG),
)
"""Errors of a disk or of limits of a process, also where they name no file."""


def main() -> None:
    """Run the command line; a `UserError` is one line on stderr and its exit status."""
    from fireopd_jax.runtime.lazy import load_when_used
    from fireopd_jax.runtime.xla_flags import compile_quickly_on_cpu

    compile_quickly_on_cpu()
    load_when_used("torch")  # transformers imports it; tokenizers use nothing of it
    command = next((each for each in sys.argv[1:] if not each.startswith("-")), "")
    with guarded_streams(product=command not in FOR_FILES):
        try:
            status = _status()
        except OutputLost as error:  # by the last flush
            status = _line(error, 1)
    sys.exit(status)


def _status() -> int | str | None:
    """Run the command; return the exit status, and print the line of an error."""
    from fireopd_jax.runtime.warnings import warnings_on_stderr

    try:
        with warnings_on_stderr():
            app()
        return 0
    except SystemExit as done:
        return _line("interrupted", 130) if done.code == 130 else done.code
    except Followed as error:
        return error.exit_status
    except UserError as error:
        if not leads():
            complain(str(error))
        return _line(error, error.exit_status)
    except OutputLost as error:
        return _line(error, 1)
    except KeyboardInterrupt:
        return _line("interrupted", 130)
    except Interrupted as error:
        return _line(error, 130)
    except Exception as error:
        if isinstance(error, FileNotFoundError) and not _has_folder():
            return _line("the folder that this was started in is gone; cd to another one", 2)
        if (reason := of_machine(error)) is not None:
            return _line(reason, 2)
        logged = getattr(error, "logged_in", None)
        if logged is None:
            sys.stderr = sys.stderr if leads() else sys.__stderr__
            raise
        reason = " ".join(str(error).split())[:200]
        return _line(
            f"an error of fireopd, not of yours: {type(error).__name__}: {reason}; the traceback "
            f"is in {logged}, please report it",
            1,
        )
    finally:
        flush_streams()


def _has_folder() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def of_machine(error: BaseException | None) -> str | None:
    """Return the line for an error of the user's disk, files or limits; None for any other."""
    while error is not None:
        if "Unable to initialize backend" in str(error):
            return f"{' '.join(str(error).split())}; fireopd env shows what there is"
        if (place := _raised_in(error)) == "xla_bridge.py":  # asserts that there is a device
            asked = os.environ.get("JAX_PLATFORMS")
            return f"no device for JAX_PLATFORMS={asked}; fireopd env shows what there is"
        if place == "config.py" and (given := [n for n in os.environ if n.startswith("JAX_")]):
            return f"a setting of JAX in the environment ({', '.join(sorted(given))}): {error}"
        if isinstance(error, ImportError) and re.search(r"\.(so|dylib|dll)\b", str(error)):
            return f"a library cannot be loaded: {error}"
        if isinstance(error, MemoryError):
            return "this machine has no more memory for this process"
        if "No usable temporary directory" in str(error):
            return f"{error}: expected one that can be written to; TMPDIR names another"
        if isinstance(error, OSError) and (error.filename is not None or error.errno in OF_MACHINE):
            names = [str(name) for name in (error.filename, error.filename2) if name is not None]
            where = f"{' -> '.join(map(_decoded, names))}: " if names else ""
            return f"{where}{error.strerror or error}"
        error = error.__cause__
    return None


def _raised_in(error: BaseException) -> str:
    """Return the name of the file of JAX's own that raised an error; "" for any other file."""
    frames = list(traceback.walk_tb(error.__traceback__))
    file = Path(frames[-1][0].f_code.co_filename) if frames else Path()
    return file.name if file.parent.parts[-2:] == ("jax", "_src") else ""


def _clipped(word: re.Match[str]) -> str:
    return f"{word[0][:SHOWN]}...{word[0][-SHOWN:]} ({len(word[0]):,} characters)"


def _decoded(name: str) -> str:
    return name[2:-1] if name.startswith(("b'", 'b"')) else name


def _line(text: object, status: int) -> int:
    shown = re.sub(rf"\S{{{LONGEST_WORD},}}", _clipped, str(text))
    print(f"fireopd: {shown}", file=sys.stderr)
    return status
