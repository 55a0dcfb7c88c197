# SPDX-License-Identifier: Apache-2.0
"""Trains what a configuration file describes: `python train.py configs/sft.py [--any.field value]`."""

import sys
from pathlib import Path

USAGE = """usage: python train.py CONFIG.py [--any.field value]

  python train.py configs/finetune.py --data.sources chats.jsonl        # as the file says, on your own chats
  python train.py configs/finetune.py --optim.lr 1e-4 --epochs 5 --out runs/mine
  python train.py configs/finetune.py --dry-run                         # what would be done, and the first batch
  python train.py configs/finetune.py --help                            # every field with its value

The same command continues a run that was interrupted."""


def main(arguments: list[str]) -> int:
    """Runs one configuration. 0 = done, or stopped by SIGTERM and saved; 2 = the user must change something."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    if arguments[0].startswith("-"):
        print(f"error: the first argument must be a config file, not {arguments[0]}\n{USAGE}", file=sys.stderr)
        return 2
    from qwen2_jax.errors import UserError
    from qwen2_jax.train import config

    run = None
    try:
        run = config.load(Path(arguments[0]), arguments[1:])
        from qwen2_jax.train import recipes  # takes seconds: after the mistakes that can be told at once

        recipes.run(run)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "" if run is None or run.resume else " without --no-resume"
        print(f"stopped; the same command{again} continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
