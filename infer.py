# SPDX-License-Identifier: Apache-2.0
"""Ask a Qwen2 model: one prompt, a chat, or a file of prompts. `python infer.py --help` shows how."""

import argparse

from qwen2_jax.infer.cli.main import main
from qwen2_jax.parallel import hosts


def plan(args: argparse.Namespace) -> int:
    """Runs --plan, which belongs to a layer above the command line of inference."""
    from qwen2_jax.plan import command

    return command.infer(args)


if __name__ == "__main__":
    hosts.leave(main(plan=plan))
