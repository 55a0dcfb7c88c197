# SPDX-License-Identifier: Apache-2.0
"""The flag --mesh of the command lines: sizes of axes. Without jax: errors are found before devices are initialised."""

from qwen2_jax.errors import UserError

MAX_DIGITS = 9


def mesh_sizes(text: str, example: str = "tensor=8,fsdp=2") -> dict[str, int]:
    """Sizes of axes from "tensor=8,fsdp=2", each 1 or above, or -1 for the remaining devices.

    example: for the error. Raises UserError for another form or a repeated axis. sharding.mesh_of checks the axes and
    the number of devices.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        number = int(size) if size == "-1" or (size.isdecimal() and size.isascii() and len(size) <= MAX_DIGITS) else 0
        if not number or not axis or axis in sizes:
            raise UserError(f"--mesh is {text!r}; give each axis once with its size, as in {example}")
        sizes[axis] = number
    return sizes
