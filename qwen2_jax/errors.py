# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can fix: command lines print one as a single line on stderr and exit with code 2."""

import sys
from collections.abc import Callable
from typing import NoReturn


class UserError(ValueError):
    """Something the user gave cannot be used: the message says what was given, what is allowed and what to do."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says what is wrong with which tensor or file, and what to do."""


def run_and_exit(main: Callable[[], int]) -> NoReturn:
    """Ends the program with main's exit code; an error that the user can fix is one line on stderr, and code 2."""
    try:
        sys.exit(main())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
