# SPDX-License-Identifier: Apache-2.0
"""Times every implementation of an operation on the current device, or counts its work for any device.

    python -m qwen2_jax.kernels.bench dual_chunk_attention --shape T=4096,N=2,K=1,H=64,chunk_len=1000
    python -m qwen2_jax.kernels.bench grouped_matmul --shape "qwen2-57b-a14b train 16k" --count --chip h200

All contenders compile and run once, then they are timed in rotation, so that other load on the machine affects all of
them alike. One sample is as many calls in a row as take about 20 ms. Printed are the best and the median sample; what
the operation needs at least (workloads.py) divided by the best time; the share of the chip's roofline that this is; the
ratio to the fastest; and the error: the largest difference from the float32 reference over its largest number, at the
same shape cut down to a few hundred tokens, so that a fast kernel that is wrong is seen.

--count runs nothing: implementations that walk a list of visits count it, and the roofline says how long that takes.
"""

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .chip_limits import CHIPS, Chip, chip_of
from .counts import added, count
from .workloads import (
    OPERATIONS,
    PASSES,
    Contender,
    Operation,
    Shape,
    draw,
    group_sizes,
    parse_shape,
    without_chunks,
)

SAMPLE_SECONDS = 0.02
LONG_SECONDS = 0.5  # what takes longer is not run once more before each sample
TABLE_BYTES = 2**30  # a reference that writes out more than this is timed only by name
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
Row = dict[str, Any]


# ---------------------------------------------------------------------- running


def program(contender: Contender, which: str) -> Callable[[], Any]:
    """One pass of a contender, ready to be called; compiled at the first call."""
    function, arrays = contender
    if which == "forward":
        forward = jax.jit(function)
        return lambda: forward(*arrays)
    out = jax.eval_shape(function, *arrays)
    cotangent = draw(*out.shape, dtype=out.dtype, seed=9)
    if which == "step":

        @jax.jit
        def step(cotangent, *arrays):
            out, pull = jax.vjp(function, *arrays)
            return out, pull(cotangent)

        return lambda: step(cotangent, *arrays)
    _, pull = jax.jit(lambda *arrays: jax.vjp(function, *arrays))(*arrays)
    backward = jax.jit(lambda pull, cotangent: pull(cotangent))
    return lambda: backward(pull, cotangent)


def seconds(run: Callable[[], Any], calls: int) -> float:
    """Time per call of `calls` calls in a row."""
    start = time.perf_counter()
    for _ in range(calls):
        results = run()
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / calls


def relative_error(got: Any, exact: Any) -> float:
    """The largest difference in units of the largest number, over all arrays of a result."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(exact), strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        worst = max(worst, float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)))
    return worst


def in_float32(op: Operation, shape: Shape, dtype) -> Contender:
    """The reference, given the same numbers as the others but in float32."""
    arrays = op.contender("reference", shape, dtype).arrays
    as_float32 = tuple(x.astype(jnp.float32) if x.dtype == dtype else x for x in arrays)
    return Contender(op.contender("reference", shape, jnp.float32).function, as_float32)


class Running(NamedTuple):
    """One pass of a contender that runs here."""

    name: str
    which: str  # the pass
    run: Callable[[], Any]
    calls: int  # in a sample
    error: float | None
    samples: list[float]


def measure(op: Operation, shape: Shape, dtype, passes, wanted, repeat: int, chip: Chip | None):
    """(rows, {name: why it did not run}, {name: how it failed}) of one shape. Measurements alternate."""
    ours = [name for table in op.tables() for name in table]
    makers: dict[str, Callable[[], Contender]] = op.rivals(ours, shape, dtype)
    makers = {name: functools.partial(op.contender, name, shape, dtype) for name in ours} | makers
    if unknown := [name for name in wanted or () if name not in makers]:
        raise ValueError(f"--implementation {unknown[0]!r} is not one of {list(makers)}")
    small, large = op.small(shape), op.table_bytes(shape) > TABLE_BYTES
    expands = ("reference",) if jax.devices()[0].platform == "tpu" else ("reference", "ragged_dot", "lax.ragged_dot")
    exact = functools.cache(lambda which: program(in_float32(op, small, dtype), which)())
    refused: dict[str, str] = {}
    failed: dict[str, str] = {}
    running: list[Running] = []
    for name in wanted or makers:
        if large and name in expands and not wanted:
            refused[name] = f"would write out {op.table_bytes(shape) / 2**30:.0f} GiB; name it to time it anyway"
            continue
        try:
            contender, mine = makers[name](), []
            for which in passes:
                run = program(contender, which)
                first = jax.block_until_ready(run())
                calls = max(1, min(200, round(SAMPLE_SECONDS / seconds(run, 1))))
                error = None
                if name in ours:
                    got = first if small == shape else program(op.contender(name, small, dtype), which)()
                    error = relative_error(got, exact(which))
                mine.append(Running(name, which, run, calls, error, []))
            running += mine
        except NotImplementedError as why:
            refused[name] = str(why)
        except Exception as why:  # a kernel that does not compile or fit must not hide the others' numbers
            failed[name] = f"{type(why).__name__}: {(str(why).strip() or '?').splitlines()[0]}"[:300]
    for _ in range(repeat):
        for entry in running:
            if not entry.samples or min(entry.samples) < LONG_SECONDS:
                seconds(entry.run, 1)  # the contender before left its own data in the caches
            entry.samples.append(seconds(entry.run, entry.calls))
    rows = []
    for which in passes:
        need, here = op.need(shape, dtype, which), [entry for entry in running if entry.which == which]
        fastest = min((min(entry.samples) for entry in here), default=0)
        for name, _, _, calls, error, samples in here:
            best, known = min(samples), name in ours
            row: Row = {"implementation": name, "pass": which, "best_ms": 1e3 * best}
            row |= {"median_ms": 1e3 * statistics.median(samples), "samples": len(samples), "calls": calls}
            row["tflops"] = need.flops / best / 1e12 if known or op.trained else None
            row["gb_s"] = need.hbm_bytes / best / 1e9 if known or not op.trained else None
            row["of_roofline"] = row["bound"] = None
            if known and chip and dtype == jnp.bfloat16:
                least, row["bound"] = chip.seconds(*need)
                row["of_roofline"] = least / best
            rows.append(row | {"ratio": best / fastest, "error": error})
    return rows, refused, failed


# ---------------------------------------------------------------------- counting


def counted(operation: str, shape: Shape, dtype, passes, wanted, chip: Chip) -> tuple[list[Row], dict[str, str]]:
    """(rows, {name: why there is no count}) of one shape on one chip."""
    op = OPERATIONS[operation]
    names = [name for table in op.tables() for name in table]
    if unknown := [name for name in wanted or () if name not in names]:
        raise ValueError(f"--implementation {unknown[0]!r} is not one of {names}")
    found, refused = {}, {}
    sizes_E = group_sizes(shape) if "E" in shape else None
    for name in wanted or names:
        try:
            found[name] = count(operation, name, shape, sizes_E, dtype, chip)
            if operation == "dual_chunk_attention":
                found[f"plain causal, {name}"] = count(
                    "flash_attention", name, without_chunks(shape), None, dtype, chip
                )
        except NotImplementedError as why:
            refused[name] = str(why)
    rows = []
    for which in passes:
        need = op.need(shape, dtype, which)
        work: dict[str, tuple[int, int, int | None]] = {"needed at least": (*need, None)}
        for name, counts in found.items():
            if which == "step" and "backward" in counts and "step" not in counts:
                counts["step"] = added(counts["forward"], counts["backward"])
            if which in counts:
                moved = counts[which]
                work[name] = int(moved.flops), int(moved.hbm_bytes), int(moved.fast_memory_bytes)  # no numpy in JSON
            else:
                refused[f"{name}, {which}"] = "not counted"
        for name, (flops, hbm_bytes, fast_bytes) in work.items():
            least, bound = chip.seconds(flops, hbm_bytes)
            row: Row = {"implementation": name, "pass": which, "flops": flops, "hbm_bytes": hbm_bytes}
            row |= {"flops_to_need": flops / need.flops, "bytes_to_need": hbm_bytes / need.hbm_bytes}
            row |= {"intensity": flops / hbm_bytes, "fast_memory_bytes": fast_bytes}
            rows.append(row | {"roofline_ms": 1e3 * least, "bound": bound})
    return rows, refused


# ---------------------------------------------------------------------- saying it


def processor() -> str:
    """The CPU's name, from the operating system."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """Where and when: device, versions, date."""
    device = jax.devices()[0]
    kind = f"{processor()}, {os.cpu_count()} logical cores" if device.platform == "cpu" else device.device_kind
    packages = {"cpu": (), "tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "nvidia-cudnn-cu13")}
    versions = [f"Python {platform.python_version()}"]
    for package in ("jax", "jaxlib", *packages.get(device.platform, ())):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.UTC)
    return {"device": kind, "versions": ", ".join(versions), "date": f"{now:%Y-%m-%d %H:%M} UTC"}


def digits(x: float | None, unit: str = "") -> str:
    """About three digits; "-" for None."""
    if x is None:
        return "-"
    if 0 < x < 0.001:
        return f"{x:.1e}{unit}"
    after = 0 if x >= 100 else 1 if x >= 10 else 2 if x >= 1 else 3 if x >= 0.1 else 4
    return f"{x:.{after}f}{unit}"


MEASURED = {
    "implementation": lambda row: row["implementation"],
    "pass": lambda row: row["pass"],
    "best ms": lambda row: digits(row["best_ms"]),
    "median ms": lambda row: digits(row["median_ms"]),
    "TFLOP/s": lambda row: digits(row["tflops"]),
    "GB/s": lambda row: digits(row["gb_s"]),
    "of roofline": lambda row: "-" if row["of_roofline"] is None else f"{row['of_roofline']:.0%} ({row['bound']})",
    "to fastest": lambda row: f"{row['ratio']:.2f}x",
    "error": lambda row: "-" if row["error"] is None else f"{row['error']:.1e}",
}
COUNTED = {
    "implementation": MEASURED["implementation"],
    "pass": MEASURED["pass"],
    "GFLOP": lambda row: digits(row["flops"] / 1e9),
    "x need": lambda row: f"{row['flops_to_need']:.3f}",
    "HBM MB": lambda row: digits(row["hbm_bytes"] / 1e6),
    "x need ": lambda row: f"{row['bytes_to_need']:.2f}",
    "FLOP/byte": lambda row: digits(row["intensity"]),
    "fast memory": lambda row: digits(row["fast_memory_bytes"] and row["fast_memory_bytes"] / 2**10, " KiB"),
    "roofline ms": lambda row: digits(row["roofline_ms"]),
    "bound by": lambda row: row["bound"],
}


def table(rows: Sequence[Row], columns: dict[str, Callable[[Row], str]]) -> str:
    """Markdown, aligned so that it reads well as plain text too; words left, numbers right."""
    cells = [[name.strip() for name in columns], *([show(row) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    left = [name in ("implementation", "pass", "bound by") for name in columns]
    lines = [[x.ljust(w) if side else x.rjust(w) for x, w, side in zip(c, widths, left, strict=True)] for c in cells]
    rule = ["-" * w if side else "-" * (w - 1) + ":" for w, side in zip(widths, left, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def spelled(shape: Shape) -> str:
    return ", ".join(f"{name}={value}" for name, value in shape.items())


def paragraphs(operation, name, shape, dtype, rows, *notes) -> str:
    """A heading, a table and what there is to say about it, in lines that a page can hold."""
    return f"{operation}, {name}: {spelled(shape)}, {dtype}\n\n{rows}\n\n{textwrap.fill(' '.join(notes), 120)}"


def reasons(what: str, refused: dict[str, str]) -> list[str]:
    """One sentence per reason, with the names that it holds for."""
    return [
        f"{what}: {', '.join(x for x in refused if refused[x] == why)} ({why})."
        for why in dict.fromkeys(refused.values())
    ]


def timed_report(operation: str, name: str, shape: Shape, args, here: dict[str, str]) -> dict[str, Any]:
    op, dtype, chip = OPERATIONS[operation], DTYPES[args.dtype], chip_of(jax.devices()[0].device_kind)
    passes = args.passes if op.trained else ["forward"]
    rows, refused, failed = measure(op, shape, dtype, passes, args.implementation, args.repeat, chip)
    tried = [x for x in op.tables()[0] if x not in refused and x not in failed]
    note = f"{here['device']}; {here['versions']}; {here['date']}. {args.repeat} samples each, alternating."
    if chip is None:
        note += " No roofline: this device is not in the table of peaks."
    elif dtype != jnp.bfloat16:
        note += " No roofline: the peaks are those of bfloat16."
    else:
        note += f" Roofline of {chip.name}: {chip.tflops:g} TFLOP/s, {chip.gb_s:g} GB/s."
    if not args.implementation and tried:
        note += f" Chosen if none is named: {tried[0]}."
    others = reasons("Not run", refused)
    text = paragraphs(operation, name, shape, args.dtype, table(rows, MEASURED), note, *others)
    text += "".join(f"\nFAILED: {x}: {why}" for x, why in failed.items())
    report = {"operation": operation, "shape": name, "sizes": dict(shape), "dtype": args.dtype, **here}
    return report | {"rows": rows, "not_run": refused, "failed": failed, "text": text}


def counted_report(operation: str, name: str, shape: Shape, args, chip: Chip) -> dict[str, Any]:
    passes = args.passes if OPERATIONS[operation].trained else ["forward"]
    rows, refused = counted(operation, shape, DTYPES[args.dtype], passes, args.implementation, chip)
    note = f"Counted, not measured. {chip.name}: {chip.tflops:g} TFLOP/s, {chip.gb_s:g} GB/s, "
    note += f"{chip.fast_bytes // 2**10} KiB of fast memory for a core or program."
    others = reasons("No count", refused)
    text = paragraphs(operation, name, shape, args.dtype, table(rows, COUNTED), note, *others)
    report = {"operation": operation, "shape": name, "sizes": dict(shape), "dtype": args.dtype, "chip": chip.name}
    return report | {"rows": rows, "no_count": refused, "text": text}


# ---------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        self.exit(2, f"bench: {message}\n")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operation", choices=OPERATIONS, metavar="OP", help=", ".join(OPERATIONS))
    parser.add_argument(
        "--shape",
        action="append",
        help='a name ("qwen2-7b train"), numbers (T=4096,N=28,K=4) or both; again for more; default: all names',
    )
    parser.add_argument("--list", action="store_true", help="print the names of the shapes, and what they are")
    parser.add_argument("--implementation", action="append", help="only this one; again for more")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=["forward", "backward"], help="of %(choices)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--repeat", type=int, default=10, help="samples of each (default: %(default)s)")
    parser.add_argument("--count", action="store_true", help="count FLOPs, bytes and fast memory instead of running")
    parser.add_argument("--chip", nargs="+", choices=CHIPS, help="for --count; default: this device, or v5p and h200")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there ('-': on the screen)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="append the tables there, as Markdown")
    args = parser.parse_args(argv)
    if args.repeat < 1:
        parser.error(f"--repeat {args.repeat}: at least 1")
    if not (args.shape or args.count or args.list) and jax.devices()[0].platform == "cpu":
        parser.error("the real shapes take hours on a CPU: give --shape, such as --shape T=1024,N=2,H=64, or --count")
    try:
        args.shapes = {
            text: parse_shape(args.operation, text) for text in args.shape or OPERATIONS[args.operation].shapes
        }
    except ValueError as error:
        parser.error(str(error))
    args.fail = parser.error
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    if args.list:
        for name, shape in OPERATIONS[args.operation].shapes.items():
            print(f"{name}: {spelled(shape)}")
        return 0
    here = machine()
    at_hand = chip_of(here["device"])
    names = args.chip or ([at_hand.name] if at_hand else ["v5p", "h200"])
    reports = []
    for name, shape in args.shapes.items():
        name = "custom" if "=" in name else name
        try:
            if args.count:
                new = [counted_report(args.operation, name, shape, args, CHIPS[chip]) for chip in names]
            else:
                new = [timed_report(args.operation, name, shape, args, here)]
                draw.cache_clear()
        except ValueError as error:
            args.fail(str(error))
        for report in new:
            text = report.pop("text")
            print(text + "\n", flush=True)
            if args.record:
                with args.record.open("a", encoding="utf-8") as out:
                    out.write(f"\n## {here['date'][:10]}: {text}\n")
        reports += new
    if args.json:
        text = json.dumps(reports, indent=1)
        print(text) if str(args.json) == "-" else args.json.write_text(text + "\n", encoding="utf-8")
    return 1 if any(report.get("failed") for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
