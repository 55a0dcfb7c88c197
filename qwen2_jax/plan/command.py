# SPDX-License-Identifier: Apache-2.0
"""The option --plan of train.py and infer.py."""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    import argparse

    from qwen2_jax.plan.report import Plan
    from qwen2_jax.train.config import Run
    from qwen2_jax.train.config_file import Recipe

WIDTH = 120  # of tables that are not printed to a terminal


def train(recipe: "Recipe", machine: str, path: Path, *, as_json: bool = False, search: bool = False) -> int:
    """Plans a training run; prints the plan. Exit code 0: it fits, 1: it does not."""
    from qwen2_jax.errors import UserError
    from qwen2_jax.plan import train as training
    from qwen2_jax.train.config import Run

    if not isinstance(recipe, Run):
        raise UserError(f"{path} trains nothing ({type(recipe).__name__}); --plan is for configurations of training")
    if search:
        return _search(recipe, machine, path, as_json)
    return _tell(lambda: training.plan(recipe, machine, path), machine, as_json)


def infer(args: "argparse.Namespace") -> int:
    """Plans inference from infer.py's arguments; prints the plan. Exit code 0: it fits, 1: it does not."""
    os.environ["JAX_PLATFORMS"] = "cpu"  # read when jax is imported: a plan needs no accelerator and takes none
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from qwen2_jax.parallel.mesh_flag import mesh_sizes
    from qwen2_jax.plan import infer as inference

    job = inference.InferenceJob(
        context=args.context, rows=args.batch, dtype=args.dtype, cache_dtype=args.cache_dtype,
        long_context=args.long_context, mesh=None if args.mesh is None else mesh_sizes(args.mesh),
        implementation=args.implementation,
    )  # fmt: skip
    return _tell(lambda: inference.plan(args.ckpt, args.plan, job), args.plan, args.json)


def _search(run: "Run", machine: str, path: Path, as_json: bool) -> int:
    """Compiles the best few settings and prints them, the fastest first, and then the estimates of more."""
    from qwen2_jax.plan import report, search
    from qwen2_jax.plan import train as training

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    candidates = search.search(run, machine, path)
    print(f"{len(candidates)} settings fit by formula; compiling {search.COMPILED}", file=sys.stderr, flush=True)
    plans = []
    for candidate in candidates[: search.COMPILED]:
        plan = training.plan(candidate.run, machine, path)
        plans.append((candidate, plan))
        print(f"{candidate.flags}: {plan.verdict}", file=sys.stderr, flush=True)
    plans.sort(key=lambda pair: (not pair[1].fits, pair[1].step_seconds))
    if as_json:
        print(json.dumps([{"flags": candidate.flags, **plan.as_json()} for candidate, plan in plans]))
    else:
        for candidate, plan in plans:
            console.rule()
            console.print(f"[bold]{candidate.flags}[/bold]", highlight=False, soft_wrap=True)
            report.show(plan, console)
        console.rule("estimated, not compiled", align="left")
        for candidate in candidates[search.COMPILED : search.COMPILED + 10]:
            console.print(str(candidate), highlight=False, soft_wrap=True)
    return 0 if plans[0][1].fits else 1


def _tell(make: "Callable[[], Plan]", machine: str, as_json: bool) -> int:
    from qwen2_jax.plan import report

    begin = time.perf_counter()
    print(f"compiling for {machine}; large models take a minute or two", file=sys.stderr, flush=True)
    plan = make()
    if as_json:
        print(json.dumps(plan.as_json() | {"plan_seconds": time.perf_counter() - begin}))
    else:
        report.show(plan, Console(width=None if sys.stdout.isatty() else WIDTH))
    return 0 if plan.fits else 1
