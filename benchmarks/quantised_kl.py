# SPDX-License-Identifier: Apache-2.0
"""KL divergence and top-1 agreement of quantised forms of one model against the original, on a text.

    python benchmarks/quantised_kl.py qwen2-0.5b --text prose.txt Q8_0=./q8_0.gguf GPTQ=./gptq int8=qwen2-0.5b@int8

Each row is NAME=CHECKPOINT, or NAME=CHECKPOINT@FORM for a form that is made when the checkpoint is loaded. A row is
written to --out when it is done, and rows that are there are not computed again: a run that was stopped continues.
"""

import argparse
import json
import sys
import time
from pathlib import Path

from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.token_rows import token_rows
from qwen2_jax.console import progress_bar
from qwen2_jax.eval.divergence import Reference
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.weights.forms import FORMS, nbytes
from qwen2_jax.weights.params import count, leaves
from qwen2_jax.weights.weight import is_matrix

HEADER = """| form | bits per weight | mean KL | median | 99% | same top token |
|---|---|---|---|---|---|"""


def arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("original", help="checkpoint in float16, bfloat16 or float32")
    parser.add_argument("rows", nargs="+", metavar="NAME=CHECKPOINT[@FORM]")
    parser.add_argument("--text", required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="positions; default: %(default)s")
    parser.add_argument("--length", type=int, default=512, help="of each piece of the text; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("quantised_kl.json"), help="default: %(default)s")
    return parser.parse_args(argv)


def bits(name: str, form: str | None) -> float:
    """Bits per number of all the model's matrices as they are stored, scales included."""
    opened = checkpoint.open_checkpoint(name)
    if form in FORMS:
        specs = {path: spec for path, spec in leaves(opened.specs) if is_matrix(spec)}
        return 8 * nbytes(specs, form) / count(specs)
    matrices = [info for info in opened.tensors.infos.values() if len(info.shape) == 2]
    return 8 * sum(info.stored_bytes for info in matrices) / sum(info.shape[0] * info.shape[1] for info in matrices)


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    source = checkpoint.locate(args.original)
    with source.folder_of_small_files() as folder:
        rows = token_rows(args.text, Tokenizer.from_folder(folder), args.tokens // args.length, args.length)
    reference = None
    for row in args.rows:
        name, _, given = row.partition("=")
        if name in done:
            continue
        if reference is None:
            with progress_bar("original") as progress:
                reference = Reference(source, rows, progress=progress)
        found, _, form = given.partition("@")
        began = time.monotonic()
        with progress_bar(name) as progress:
            summary = reference.divergence(found, form or "float32", progress).summary()
        done[name] = summary | {"bits": bits(found, form), "seconds": time.monotonic() - began}
        args.out.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name}: {done[name]}", file=sys.stderr, flush=True)
    print(HEADER)
    for name, row in done.items():
        numbers = f"{row['mean_kl']:.4f} | {row['median_kl']:.4f} | {row['p99_kl']:.3f} | {row['top1']:.1%}"
        print(f"| {name} | {row['bits']:.2f} | {numbers} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
