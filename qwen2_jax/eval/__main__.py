# SPDX-License-Identifier: Apache-2.0
"""python -m qwen2_jax.eval divergence: how far a checkpoint, for example a quantised one, is from another."""

import argparse
import json
import sys

from qwen2_jax.config.model_config import DTYPES
from qwen2_jax.errors import UserError

EPILOG = """example:
  python -m qwen2_jax.eval divergence Qwen/Qwen2-7B-Instruct ./qwen2-7b-instruct-q4_k_m.gguf --text prose.txt

Prints one line of JSON: mean, median and 99% quantile of the KL divergence in nats, the share of positions at which
both models have the same most probable token (top1), and the number of positions. Both models are run a layer at a
time, so that they need little memory."""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m qwen2_jax.eval", description="Evaluate models.", epilog=EPILOG, formatter_class=raw
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="divergence")
    one = commands.add_parser(
        "divergence", help="compare a checkpoint with another, on a text", epilog=EPILOG, formatter_class=raw
    )
    one.add_argument("reference", help="checkpoint to compare with, as everywhere: a preset, a Hub id, a folder, ...")
    one.add_argument("model", help="checkpoint to judge")
    one.add_argument(
        "--text", required=True, metavar="FILE", help="a text file, or .jsonl with lines of chats (messages) or texts"
    )
    one.add_argument("--tokens", type=int, default=8192, help="how many to compare at; default: %(default)s")
    one.add_argument("--length", type=int, default=1024, help="of each piece of the text; default: %(default)s")
    one.add_argument(
        "--dtype", default="float32", choices=(*DTYPES, "int8"), help="of MODEL: what it is computed in, or int8 "
        "matrices; the reference is float32; default: %(default)s",
    )  # fmt: skip
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        from qwen2_jax.console import progress_bar
        from qwen2_jax.eval.divergence import compare_on_text

        with progress_bar("comparing") as progress:
            found = compare_on_text(
                args.reference, args.model, args.text,
                tokens=args.tokens, length=args.length, dtype=args.dtype, progress=progress,
            )  # fmt: skip
    except (UserError, OSError) as why:
        print(f"error: {' '.join(str(why).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps({name: round(value, 6) for name, value in found.summary().items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
