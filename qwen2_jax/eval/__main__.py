# SPDX-License-Identifier: Apache-2.0
"""python -m qwen2_jax.eval compare: how far a checkpoint, for example a quantised one, is from another."""

import argparse
import json
import sys
from pathlib import Path

from qwen2_jax.config.model_config import DTYPES
from qwen2_jax.errors import UserError, one_line
from qwen2_jax.files.atomic_folder import new_file

EPILOG = """example:
  python -m qwen2_jax.eval compare Qwen/Qwen2-7B-Instruct ./qwen2-7b-instruct-q4_k_m.gguf --text prose.txt

Prints one line of JSON: mean, median and 99% quantile of the KL divergence in nats, the share of positions at which
both models have the same most probable token (top1), the perplexity of both on the text and the ratio of B's to A's,
and the number of positions. Both models are run a layer at a
time, so that they need little memory."""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m qwen2_jax.eval", description="Evaluate models.", epilog=EPILOG, formatter_class=raw
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="compare")
    one = commands.add_parser(
        "compare", help="how far a checkpoint is from another, on a text", epilog=EPILOG, formatter_class=raw
    )
    one.add_argument("a", metavar="A", help="checkpoint to compare with, as everywhere: a preset, a Hub id, a folder")
    one.add_argument("b", metavar="B", help="checkpoint to judge")
    one.add_argument(
        "--text", required=True, metavar="FILE", help="a text file, or .jsonl with lines of chats (messages) or texts"
    )
    one.add_argument("--tokens", type=int, default=8192, help="how many to compare at; default: %(default)s")
    one.add_argument("--length", type=int, default=1024, help="of each piece of the text; default: %(default)s")
    for which in ("a", "b"):
        one.add_argument(
            f"--dtype-{which}", default="float32", choices=(*DTYPES, "int8", "int4"),
            help=f"what {which.upper()} is computed in; int8, int4: its matrices in that form; default: %(default)s",
        )  # fmt: skip
        one.add_argument(
            f"--cache-dtype-{which}", choices=("bfloat16", "float32", "int8"),
            help=f"what {which.upper()}'s keys and values are rounded to, as in a cache; default: not at all",
        )  # fmt: skip
    one.add_argument(
        "--json", type=Path, metavar="OUT", help="also write the result to this file, which must not exist"
    )
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        from qwen2_jax.console import progress_bar
        from qwen2_jax.eval.divergence import compare_on_text

        with progress_bar("comparing") as progress:
            found = compare_on_text(
                args.a, args.b, args.text, tokens=args.tokens, length=args.length, progress=progress,
                dtypes=(args.dtype_a, args.dtype_b), cache_dtypes=(args.cache_dtype_a, args.cache_dtype_b),
            )  # fmt: skip
        text = json.dumps({name: round(value, 6) for name, value in found.summary().items()})
        if args.json is not None:
            content = f"{text}\n".encode()
            with new_file(args.json, len(content)) as out:
                out.write(content)
    except (UserError, OSError) as why:
        print(f"error: {one_line(why)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
