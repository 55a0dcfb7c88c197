# SPDX-License-Identifier: Apache-2.0
"""The one exception that command lines turn into a single line on stderr and exit code 2."""


class UserError(ValueError):
    """Something the user gave cannot be used: the message says what was given, what is allowed and what to do."""
