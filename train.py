# SPDX-License-Identifier: Apache-2.0
"""Trains what a configuration file describes: `python train.py configs/demo.py [--any.field value]`."""

import sys
from pathlib import Path

USAGE = """usage: python train.py CONFIG.py [--any.field value]

  python train.py configs/demo.py                        # as the file says
  python train.py configs/demo.py --optim.lr 1e-3 --steps 100
  python train.py configs/demo.py --help                 # every field with its value"""


def main(arguments: list[str]) -> int:
    """Runs one configuration. 0 = done, 2 = the user must change something."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        print(f"error: the first argument must be a config file, not {arguments[0]}\n{USAGE}", file=sys.stderr)
        return 2
    from qwen2_jax.errors import UserError
    from qwen2_jax.train import config

    try:
        run = config.load(Path(arguments[0]), arguments[1:])
        from qwen2_jax.train import pretrain  # takes seconds: after the mistakes that can be told at once

        pretrain.run(run)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues from the last saved state", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
