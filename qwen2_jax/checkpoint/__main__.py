# SPDX-License-Identifier: Apache-2.0
"""python -m qwen2_jax.checkpoint convert|merge|verify|inspect: change, combine, check and look into checkpoints."""

import argparse
import collections
import dataclasses
import json
import sys
import warnings

import jax

from qwen2_jax.checkpoint.gptq.write import LENGTH, MAX_KL, SEQUENCES
from qwen2_jax.checkpoint.merge_models import KEEP, METHODS, Merge, merge
from qwen2_jax.checkpoint.sources import NotFound
from qwen2_jax.checkpoint.transfer.write import WRITERS
from qwen2_jax.config.model_config import DTYPES
from qwen2_jax.console import progress_bar, readable_bytes
from qwen2_jax.errors import CheckpointError, UserError, exit_code
from qwen2_jax.parallel.mesh_flag import mesh_sizes
from qwen2_jax.parallel.sharding import RULES

EPILOG = """a checkpoint is a folder in Hugging Face or Orbax format, a preset (qwen2-7b-instruct), a Hub id
(Qwen/Qwen2-7B), a .gguf file, a gs:// path of an Orbax folder, or 'demo'.

examples:
  python -m qwen2_jax.checkpoint inspect demo
  python -m qwen2_jax.checkpoint convert Qwen/Qwen2-7B ./qwen2-7b-orbax --to orbax
  python -m qwen2_jax.checkpoint convert ./qwen2-7b-orbax ./qwen2-7b-hf --to hf      # byte-identical files
  python -m qwen2_jax.checkpoint convert demo ./demo-float32 --to hf --dtype float32
  python -m qwen2_jax.checkpoint convert ./qwen2-7b-q4_k_m.gguf ./qwen2-7b-hf --to hf
  python -m qwen2_jax.checkpoint convert ./qwen2-7b-hf ./qwen2-7b-q8_0.gguf --to gguf --dtype q8_0
  python -m qwen2_jax.checkpoint convert ./qwen2-7b-hf ./qwen2-7b-gptq --to gptq --text chats.jsonl
  python -m qwen2_jax.checkpoint convert qwen2-72b --to orbax --plan 16 --mesh fsdp=16,tensor=4
  python -m qwen2_jax.checkpoint merge ./base ./maths ./code --out ./both --method ties --keep 0.2
  python -m qwen2_jax.checkpoint verify ./qwen2-7b-hf

exit codes: 0 done, 1 verify found damage, 2 the command cannot be carried out."""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog="python -m qwen2_jax.checkpoint",
        description="Convert, merge, verify and inspect Qwen2 checkpoints, one array in memory at a time.",
        epilog=EPILOG,
        formatter_class=raw,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="convert|merge|verify|inspect")

    convert = commands.add_parser(
        "convert", help="copy a checkpoint into another format", epilog=EPILOG, formatter_class=raw
    )
    convert.add_argument("src", help="checkpoint to read")
    convert.add_argument(
        "dst",
        nargs="?",
        help="folder (or .gguf file) to write; it must not exist, and appears only when it is complete",
    )
    convert.add_argument(
        "--to", required=True, choices=(*WRITERS, "gguf", "gptq"), help="format of the new folder or .gguf file"
    )
    convert.add_argument(
        "--text",
        metavar="FILE",
        help="with --to gptq: text that is like the model's use, to choose the 4-bit weights "
        "by and to check them on: a text file, or .jsonl with lines of chats (messages) or texts (text)",
    )
    convert.add_argument(
        "--sequences",
        type=int,
        metavar="N",
        help=f"with --to gptq: pieces of the text to calibrate on, as far as it goes; default: {SEQUENCES}",
    )
    convert.add_argument(
        "--length", type=int, metavar="TOKENS", help=f"with --to gptq: of each piece; default: {LENGTH}"
    )
    convert.add_argument(
        "--max-kl", type=float, metavar="NATS", help="with --to gptq: refuse a model whose mean KL divergence from "
        f"SRC on held-out text is larger; default: {MAX_KL:g}",
    )  # fmt: skip
    convert.add_argument(
        "--dtype",
        choices=(*DTYPES, "q8_0"),
        help="cast every tensor; default: each keeps its own, and quantised ones get the dtype of config.json; "
        "q8_0: with --to gguf, eight bits in blocks of 32",
    )
    convert.add_argument(
        "--max-shard-gb",
        type=float,
        metavar="GB",
        help="largest weight file of --to hf; default: as in SRC, else 5",
    )
    convert.add_argument(
        "--plan", type=int, metavar="HOSTS", help="convert nothing: show the bytes that each of HOSTS hosts would "
        "read, hold in memory and write; src may be a preset that is not downloaded",
    )  # fmt: skip
    convert.add_argument(
        "--mesh",
        metavar="AXIS=N,...",
        help="with --plan: also load the result onto this mesh, as in fsdp=16,tensor=4",
    )
    convert.add_argument(
        "--json", action="store_true", help="with --plan: one line of JSON with the bytes of each host"
    )

    combine = commands.add_parser(
        "merge", help="combine checkpoints that were trained from one base", epilog=EPILOG, formatter_class=raw,
        description="OUT = BASE + scale * the merged differences MODEL - BASE. Tokenizer and other files are BASE's.",
    )  # fmt: skip
    combine.add_argument("base", help="checkpoint that all models were trained from; all are in Hugging Face format")
    combine.add_argument("models", nargs="+", metavar="model", help="checkpoint of the same architecture")
    combine.add_argument(
        "--out", required=True, help="folder to write; it must not exist, and appears only when complete"
    )
    combine.add_argument(
        "--method", choices=METHODS, default="linear", help="linear: weighted sum of the differences; ties: their "
        "largest entries, a common sign, the mean of those that have it; dare: random entries, scaled up, then either; "
        "default: %(default)s",
    )  # fmt: skip
    combine.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="one for each model; default: equal ones that add to 1"
    )
    combine.add_argument(
        "--keep",
        type=float,
        metavar="P",
        help=f"share of each tensor's entries that ties and dare keep; default: {KEEP}",
    )
    combine.add_argument(
        "--scale", type=float, default=1.0, help="factor of the merged differences; default: %(default)s"
    )
    combine.add_argument("--seed", type=int, default=0, help="seed of dare's random entries; default: %(default)s")
    combine.add_argument("--dtype", choices=DTYPES, help="dtype of the result; default: each tensor as in BASE")

    verify = commands.add_parser(
        "verify", help="compare a checkpoint with its manifest", epilog=EPILOG, formatter_class=raw
    )
    verify.add_argument("dir", help="checkpoint to read completely")

    inspect = commands.add_parser("inspect", help="show what a checkpoint holds", epilog=EPILOG, formatter_class=raw)
    inspect.add_argument("dir", help="checkpoint; its weights are not read")
    inspect.add_argument("--arrays", action="store_true", help="list every tensor with dtype and shape")
    return top


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code, as errors.exit_code."""
    args = parser().parse_args(argv)
    command = {"convert": _convert, "merge": _merge, "verify": _verify, "inspect": _inspect}[args.command]
    with warnings.catch_warnings():
        warnings.filterwarnings("default", category=UserWarning, module="qwen2_jax")
        warnings.showwarning = lambda message, *rest, **more: print(f"warning: {message}", file=sys.stderr)
        return exit_code(lambda: command(args), interrupted="stopped; nothing was left behind")


def _convert(args: argparse.Namespace) -> int:
    from qwen2_jax.checkpoint import convert

    if args.plan is not None:
        return _plan(args)
    if args.dst is None:
        raise UserError("convert needs a folder to write: convert SRC DST --to ...; only --plan does without")
    if args.mesh or args.json:
        raise UserError("--mesh and --json belong to --plan HOSTS; leave them out, or add it")
    if args.to == "gptq":
        return _convert_to_gptq(args)
    if given := [f"--{name}" for name in ("text", "sequences", "length", "max_kl") if getattr(args, name) is not None]:
        raise UserError(f"{given[0]} belongs to --to gptq; leave it out")
    first = jax.process_index() == 0  # of several processes, the first one reports
    with progress_bar("converting", quiet=not first) as progress:
        shard = None if args.max_shard_gb is None else int(args.max_shard_gb * 1e9)
        convert(args.src, args.dst, args.to, dtype=args.dtype, max_shard_bytes=shard, progress=progress)
    if first:
        print(f"wrote {args.dst} ({args.to}); `verify {args.dst}` checks it")
    return 0


def _convert_to_gptq(args: argparse.Namespace) -> int:
    from qwen2_jax.checkpoint import write_gptq

    if args.text is None:
        raise UserError("--to gptq needs --text FILE: text that is like the model's use")
    if args.max_shard_gb is not None or args.dtype == "q8_0":
        raise UserError("--max-shard-gb and q8_0 do not belong to --to gptq; leave them out")
    given = {name: getattr(args, name) for name in ("dtype", "sequences", "length", "max_kl")}
    given = {name: value for name, value in given.items() if value is not None}
    with progress_bar("calibrating") as progress:
        write_gptq(args.src, args.dst, args.text, show=print, progress=progress, **given)
    print(f"wrote {args.dst} (gptq, 4 bits); `verify {args.dst}` checks it")
    return 0


def _plan(args: argparse.Namespace) -> int:
    from qwen2_jax.checkpoint import byte_plan

    if args.to in ("gguf", "gptq"):
        raise UserError(f"there is no plan for {args.to}, which one process writes; a plan is for --to hf or orbax")
    source = byte_plan.declared(args.src)
    steps = [byte_plan.convert_step(source, args.to, args.plan, dtype=args.dtype)]
    if args.mesh:
        steps.append(byte_plan.load_step(source, args.to, _mesh(args.mesh), args.plan, dtype=args.dtype))
    if args.json:
        print(json.dumps({"hosts": args.plan, "steps": [dataclasses.asdict(step) for step in steps]}))
        return 0
    rows: list[tuple[str, ...]] = [("bytes per host", "reads", "holds", "writes")]
    for step in steps:
        spans = ((min(of), max(of)) for of in (step.reads, step.holds, step.writes))
        cells = (readable_bytes(b) if a == b else f"{readable_bytes(a)} .. {readable_bytes(b)}" for a, b in spans)
        rows.append((step.name, *cells))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers in rows:
        print("  ".join([f"{name:{widths[0]}}", *(f"{n:>{w}}" for n, w in zip(numbers, widths[1:], strict=True))]))
    return 0


def _mesh(text: str) -> dict[str, int]:
    """ "fsdp=16,tensor=4" as numbers."""
    sizes = mesh_sizes(text, "fsdp=16,tensor=4")
    if -1 in sizes.values():
        raise UserError(f"--mesh is {text!r}; -1 takes the devices that are here, and a plan has none: give the size")
    known = {a for axes in RULES.values() if axes for a in ((axes,) if isinstance(axes, str) else axes)}
    if unknown := [axis for axis in sizes if axis not in known]:
        raise UserError(f"--mesh has the axis {unknown[0]!r}; choose from {', '.join(sorted(known))}")
    return sizes


def _merge(args: argparse.Namespace) -> int:
    weights = None if args.weights is None else tuple(args.weights)
    how = Merge(method=args.method, weights=weights, keep=args.keep, scale=args.scale, seed=args.seed)
    with progress_bar("merging") as progress:
        merge(args.base, args.models, args.out, how, dtype=args.dtype, progress=progress)
    print(f"wrote {args.out} (hf); `verify {args.out}` checks it")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from qwen2_jax.checkpoint import locate, verify

    source = locate(args.dir)
    try:
        with progress_bar("verifying") as progress:
            report = verify(source, progress=progress)
    except NotFound:
        raise
    except CheckpointError as why:  # so damaged that its tensors cannot be compared one by one
        print(f"damaged: {why}", file=sys.stderr)
        return 1
    for line in report.damaged:
        print(f"damaged: {line}", file=sys.stderr)
    if report.damaged:
        print(f"{args.dir}: {len(report.damaged)} damaged; fetch or convert the checkpoint again", file=sys.stderr)
        return 1
    size = f"{report.tensors} tensors, {readable_bytes(report.nbytes)}"
    if report.hashed:
        print(f"{args.dir}: {size}: every hash is right")
    else:
        print(
            f"{args.dir}: {size}: names, shapes and sizes are right; there is no manifest.json, so no hash was compared"
        )
    return 0


def _inspect(args: argparse.Namespace) -> int:
    from qwen2_jax.checkpoint import open_checkpoint
    from qwen2_jax.checkpoint.formats.small_files import MANIFEST

    opened = open_checkpoint(args.dir)
    config, infos = opened.config, opened.tensors.infos
    bytes_of: collections.Counter[str] = collections.Counter()
    for info in infos.values():
        bytes_of[info.kind] += info.stored_bytes
    rows = {
        "folder": str(opened.source.path),
        "format": opened.source.format.title,
        "model": config.model_type,
        "parameters": f"{sum(info.nbytes // info.dtype.itemsize for info in infos.values()):,}",
        "bytes": readable_bytes(sum(bytes_of.values())),
        "stored as": ", ".join(f"{kind} {readable_bytes(n)}" for kind, n in bytes_of.most_common()),
        "tensors": str(len(infos)),
        "manifest": "yes" if opened.source.read_bytes(MANIFEST) is not None else "no",
    }
    rows |= {key: json.dumps(value) for key, value in config.to_hf().items()}
    width = max(map(len, rows))
    print("\n".join(f"{name:{width}}  {value}" for name, value in rows.items()))
    if args.arrays:
        width = max(map(len, infos))
        print()
        for name, info in infos.items():
            print(f"{name:{width}}  {info.kind:8}  {readable_bytes(info.stored_bytes):>11}  {list(info.shape)}")
    return 0


if __name__ == "__main__":
    if "gptq" not in sys.argv:  # nothing else here needs an accelerator, and one may be in use
        jax.config.update("jax_platforms", "cpu")
    sys.exit(main())
