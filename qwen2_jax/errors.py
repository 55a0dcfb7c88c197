# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix: command lines print one as a single line on stderr and exit with code 2."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something the user gave cannot be used: the message says what was given, what is allowed and what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says what is wrong with which tensor or file, and what to do."""


def one_line(error: BaseException) -> str:
    """The error as one line; of an OSError what failed and where, without its number."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror and not isinstance(error, UserError):
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    return " ".join(text.split())


def exit_code(main: Callable[[], int], *, interrupted: str = "stopped") -> int:
    """main's exit code. An error that the user can fix is one line on stderr and code 2; Ctrl-C prints a line, 130."""
    try:
        return main()
    except (UserError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Ends the program with exit_code(main)."""
    sys.exit(exit_code(main))
