"""Errors that a user can put right, what a script's main makes of them, and what is said without being one."""

import functools
import os
import sys
from collections.abc import Callable

import torch


class UserError(Exception):
    """Something the user can put right. One line: what, where, what to do. Becomes exit code 2, without a traceback."""


@functools.cache  # every message once, however often the same folder or request comes
def note(message: str) -> None:
    print(message, file=sys.stderr)


def cli(main: Callable[[list[str] | None], object]) -> int:
    """Runs a script's main: a UserError becomes one line and exit code 2."""
    try:
        main(None)
        sys.stdout.flush()  # here and not at exit, where nobody could catch what it raises
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        print("stopped: what read the output is gone (as `head` is after ten lines)", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or exit would try to write the rest
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}; free some space or choose another --out", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"\nstopped; {stopped or 'checkpoints that were written stay'}", file=sys.stderr)
        return 130
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        reason = (str(error).splitlines() or ["no reason given"])[0]
        print(f"error: out of memory ({reason}); use a higher --accumulate, --checkpointing, a lower --batch or lower "
              "resolution", file=sys.stderr)
        return 2
    return 0
