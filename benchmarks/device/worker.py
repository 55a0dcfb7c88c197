# SPDX-License-Identifier: Apache-2.0
"""Runs the cases of one piece and writes a line of JSON before and after each: a process of its own, which may die.

    python -m benchmarks.device.worker PIECE PLATFORM [--small] [--done CASE ...]

A case returns its numbers. What it raises is its status: AssertionError "wrong", NotImplementedError "refused" (the
implementation says that it does not take this), Skipped or a missing package "skipped", anything else "failed". After
an error of the device the process ends, because the next case would get the same broken device: __main__.py starts
another for the rest.
"""

import argparse
import importlib
import json
import os
import sys
import time
import traceback
from pathlib import Path

from .pieces import BY_NAME, Setting

ROOT = Path(__file__).parents[2]
LAST_LINES = 6  # of a traceback


class Skipped(Exception):
    """This case cannot be tried here; the text says why."""


def find_sources() -> None:
    """Makes `qwen2_jax.kernels` and the tests' inputs importable, also where nothing is installed but jax."""
    import qwen2_jax

    if importlib.util.find_spec("qwen2_jax.kernels") is None:
        qwen2_jax.__path__.append(str(ROOT))  # kernels/ stands beside qwen2_jax/ in a clone
    sys.path.insert(0, str(ROOT / "tests"))


def outcome(case) -> tuple[dict, bool]:
    """(what to report, whether the device may be broken now)."""
    import jax

    try:
        numbers = case() or {}
    except AssertionError as error:
        return {"status": "wrong", "error": last_lines(str(error))}, False
    except NotImplementedError as error:
        return {"status": "refused", "error": str(error)}, False
    except (Skipped, ModuleNotFoundError) as error:
        return {"status": "skipped", "error": str(error)}, False
    except Exception as error:
        text = "".join(traceback.format_exception(error))
        print(text, file=sys.stderr)
        full = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower()
        report = {"status": "out of memory" if full else "failed", "error": last_lines(str(error) or text)}
        return report, isinstance(error, jax.errors.JaxRuntimeError | MemoryError)
    problem = numbers.pop("problem", None)  # what was measured stays, although some of it is not as it should be
    failed = {"error": problem} if problem else {}
    return {"status": "failed" if problem else "ok", "numbers": numbers} | failed, False


def last_lines(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-LAST_LINES:])[-1500:]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("piece")
    parser.add_argument("platform")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--done", nargs="*", default=[])
    args = parser.parse_args()
    lines = os.fdopen(os.dup(1), "w", buffering=1)  # libraries print to stdout; the lines have a channel of their own
    os.dup2(2, 1)

    def say(**what):
        print(json.dumps(what), file=lines)

    piece = BY_NAME[args.piece]
    if missing := [name for name in piece.needs if importlib.util.find_spec(name) is None]:
        say(plan=["-"])
        say(case="-", status="skipped", error=f"{', '.join(missing)} is not installed", seconds=0)
        return
    find_sources()
    if args.platform == "cpu":  # every program runs once or twice: compiling is what takes the time
        importlib.import_module("jax").config.update("jax_disable_most_optimizations", True)
    module, function = piece.cases.split(".")
    cases = getattr(importlib.import_module(f".{module}", __package__), function)(Setting(args.platform, args.small))
    say(plan=list(cases))
    for name, case in cases.items():
        if name in args.done:
            continue
        say(begin=name)
        start = time.perf_counter()
        report, broken = outcome(case)
        say(case=name, seconds=round(time.perf_counter() - start, 2), **report)
        if broken:
            return


if __name__ == "__main__":
    main()
