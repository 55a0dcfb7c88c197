# SPDX-License-Identifier: Apache-2.0
"""python -m qwen2_jax.data show|tokenize|inspect: which tokens of a record are trained; a corpus tokenized ahead."""

import argparse
import itertools
import sys
import tempfile
from pathlib import Path
from typing import get_args

import jax
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwen2_jax.console import progress_bar
from qwen2_jax.data.tokens import show
from qwen2_jax.errors import UserError, exit_code

EPILOG = """SRC is a file, a folder or a glob of .jsonl, .json, .txt, .md, .py (each also .gz or .zst), .parquet or
.array_record, or a folder written by Hugging Face's datasets. CKPT is a folder with a tokenizer, a checkpoint's name,
or 'demo'.

examples:
  python -m qwen2_jax.data show chats.jsonl --record 7 --tokenizer Qwen/Qwen2-7B-Instruct
  python -m qwen2_jax.data tokenize chats.jsonl ./chats-tokens --tokenizer Qwen/Qwen2-7B-Instruct
  python -m qwen2_jax.data tokenize 'books/*.txt.zst' ./books-tokens --tokenizer qwen2-7b
  python -m qwen2_jax.data inspect ./chats-tokens --tokenizer Qwen/Qwen2-7B-Instruct

A run takes the folder as Source(path="./chats-tokens"). exit codes: 0 success, 2 error."""
SHOWN = 400  # tokens of the first document, or of each sequence of the first ranking


def parser() -> argparse.ArgumentParser:
    from qwen2_jax.data.spec import Format
    from qwen2_jax.data.tokens.encode import Targets

    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m qwen2_jax.data",
        description="Show which tokens of a record are trained, tokenize data ahead of a run, or inspect the result.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="show|tokenize|inspect")
    formats = [name for name in get_args(Format) if name != "tokens"]

    about = "show which tokens of one record are trained"
    shown = commands.add_parser("show", help=about, epilog=EPILOG, formatter_class=raw)
    shown.add_argument("src", help="data to read")
    shown.add_argument("--record", type=int, default=1, metavar="N", help="its number, from 1 (default: 1)")

    tokenize = commands.add_parser("tokenize", help="write token ids", epilog=EPILOG, formatter_class=raw)
    tokenize.add_argument("src", help="data to read")
    tokenize.add_argument("dst", help="folder to write; it is published only when complete")
    for command in (shown, tokenize):
        command.add_argument("--tokenizer", required=True, metavar="CKPT", help="whose tokenizer and chat template")
        command.add_argument("--format", choices=formats, default="auto", help="default: from the first record")
        command.add_argument(
            "--targets", choices=get_args(Targets), default="assistant", help="what of a chat is trained"
        )

    inspect = commands.add_parser("inspect", help="show what was written", epilog=EPILOG, formatter_class=raw)
    inspect.add_argument("path", help="folder made by tokenize, or in a run's tokens/")
    inspect.add_argument("--tokenizer", metavar="CKPT", help="to show text; without it, ids are shown")
    return top


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as errors.exit_code."""
    args = parser().parse_args(argv)
    command = {"show": _show, "tokenize": _tokenize, "inspect": _inspect}[args.command]
    return exit_code(lambda: command(args), interrupted="stopped; nothing was left behind")


def _tokenizer(name: str):
    from qwen2_jax.checkpoint.sources import locate
    from qwen2_jax.tokenizer import Tokenizer

    folder = Path(name).expanduser()  # a tokenizer may come without a model
    if (folder / "tokenizer.json").exists():
        return Tokenizer.from_folder(folder)
    with locate(name).folder_of_small_files() as small_files:
        return Tokenizer.from_folder(small_files)


def _show(args: argparse.Namespace) -> int:
    from qwen2_jax.data.formats import record_formats
    from qwen2_jax.data.sources.records import open_records
    from qwen2_jax.data.tokens.encode import Encoder
    from qwen2_jax.data.tokens.store import detect

    encoder = Encoder(_tokenizer(args.tokenizer), args.targets)
    with tempfile.TemporaryDirectory() as unpacked:
        records = open_records(args.src, Path(unpacked))
        format = detect(records, args.format, args.src)
        if not 1 <= args.record <= len(records):
            raise UserError(f"--record is {args.record}; {args.src} has the records 1 to {len(records):,}")
        where = records.where(args.record - 1)
        document = record_formats.read(records[args.record - 1], format, where)
    try:
        encoded = encoder.encode(document)
    except UserError as why:
        raise UserError(f"{where}: {why}") from why
    tokens, is_target = np.asarray(encoded.tokens, np.int64), np.asarray(encoded.is_target, bool)
    begins = None if encoded.begins is None else np.asarray(encoded.begins, bool)
    sequences = 1 if begins is None else int(begins.sum())
    count, console = int(is_target[1:].sum()), Console(highlight=False)
    console.print(show.visible(f"{format}, {len(tokens):,} tokens, {count:,} of them trained"))
    if not count:
        console.print("nothing in it is trained, and a run leaves it out", style="bold")
    _print_document(console, where, tokens, is_target, begins, encoder.tokenizer, len(tokens), sequences)
    return 0


def _tokenize(args: argparse.Namespace) -> int:
    from qwen2_jax.data.sources.records import open_records
    from qwen2_jax.data.tokens.encode import Encoder
    from qwen2_jax.data.tokens.store import build

    if Path(args.dst).exists():
        raise UserError(f"{args.dst} exists already; choose a new folder or remove that one first")
    encoder = Encoder(_tokenizer(args.tokenizer), args.targets)
    parent = Path(args.dst).absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Beside the result: /tmp may be small, and in memory.
    unpacked = tempfile.TemporaryDirectory(prefix=".unpacked-", dir=parent)
    with unpacked, progress_bar(f"tokenizing {args.src}", in_bytes=False) as progress:
        records = open_records(args.src, Path(unpacked.name))
        meta = build(records, args.format, encoder, args.dst, name=args.src, progress=progress).meta
    left_out = (
        f"; left out: {meta.empty} empty, {meta.untargeted} without a target" if meta.kept < meta.documents else ""
    )
    print(
        f"wrote {args.dst}: {meta.kept:,} documents, {meta.tokens:,} tokens, {meta.trained:,} of them trained{left_out}"
    )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from qwen2_jax.data.tokens.store import TokenStore, same_tokenizer

    store = TokenStore(args.path)
    tokenizer = _tokenizer(args.tokenizer) if args.tokenizer else None
    if tokenizer and not same_tokenizer(store.meta, tokenizer):
        raise UserError(f"{args.path} was made with another tokenizer than that of {args.tokenizer}")
    meta, lengths = store.meta, store.lengths
    (kept,) = np.nonzero(lengths)
    names = ("shortest", "10%", "median", "90%", "99%", "longest")
    spread = np.percentile(lengths[kept], (0, 10, 50, 90, 99, 100))
    table = Table.grid(padding=(0, 2))
    for name, value in {
        "folder": args.path,
        "format": meta.format,
        **({"ranks": f"at most {meta.ranks} responses of each prompt"} if meta.ranks > 1 else {}),
        "targets": "all" if meta.format == "text" else meta.targets,
        "documents": f"{meta.kept:,}",
        "left out": f"{meta.empty:,} empty, {meta.untargeted:,} without a target",
        "tokens": f"{meta.tokens:,}",
        "trained": f"{meta.trained:,} ({meta.trained / meta.tokens:.1%})",
        "lengths": ", ".join(f"{n:,.0f} ({which})" for which, n in zip(names, spread, strict=True)),
    }.items():
        table.add_row(name, value)
    console = Console(highlight=False)
    console.print(table)
    tokens, is_target = store.document(int(kept[0]))
    begins = store.begins(*store.offsets[kept[0] : kept[0] + 2].tolist())
    _print_document(console, store.where(int(kept[0])), tokens, is_target, begins, tokenizer, SHOWN, store.ranks)
    return 0


def _print_document(
    console: Console,
    where: str,
    tokens: np.ndarray,
    is_target: np.ndarray,
    begins: np.ndarray | None,
    tokenizer,
    most: int,
    ranks: int,
) -> None:
    """Prints a document with its targets marked.

    begins: of a ranking, where its sequences begin; most: tokens of each that are printed; ranks: names them.
    """
    marks = ("", "") if console.color_system else show.MARKS
    trained = Text.assemble("trained tokens ", (f"{marks[0]}like this{marks[1]}", show.STYLES["target"]))
    console.print(Text.assemble(f"\n{show.visible(where)}, ", trained, ":"), soft_wrap=True)
    edges = [0, len(tokens)] if begins is None else [*np.flatnonzero(begins).tolist(), len(tokens)]
    for rank, (a, b) in enumerate(itertools.pairwise(edges)):
        if begins is not None:
            console.print(Text(f"--- {show.rank_name(rank, ranks)}: {b - a:,} tokens ---", "bold"))
        end = min(b, a + most)
        console.print(_coloured(tokens[a:end], is_target[a:end], tokenizer, marks), soft_wrap=True)
        if b > end:
            console.print(f"... and {b - end:,} tokens more")


def _coloured(tokens: np.ndarray, is_target: np.ndarray, tokenizer, marks: tuple[str, str]) -> Text:
    """The text of the tokens, or their ids, with targets marked as in show.py."""
    text = Text()
    if tokenizer:
        for piece, style in show.runs(tokenizer, tokens.tolist(), is_target.tolist(), marks):
            text.append(piece, style)
        return text
    edges = [0, *(np.nonzero(np.diff(is_target))[0] + 1).tolist(), len(tokens)]
    for a, b in itertools.pairwise(edges):
        ids, target = " ".join(map(str, tokens[a:b].tolist())), is_target[a]
        text.append(
            f"{marks[0]}{ids}{marks[1]} " if target else f"{ids} ", show.STYLES["target" if target else "context"]
        )
    return text


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator, and one may be in use
    sys.exit(main())
