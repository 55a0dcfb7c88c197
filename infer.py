# SPDX-License-Identifier: Apache-2.0
"""Ask a Qwen2 model: one prompt, a chat, or a file of prompts. `python infer.py --help` shows how."""

import sys

from qwen2_jax.infer.cli import main

if __name__ == "__main__":
    sys.exit(main())
