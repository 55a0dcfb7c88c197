# SPDX-License-Identifier: Apache-2.0
"""Proves one accelerator: every kernel right and timed, the model run and trained on it, within a few minutes.

    python -m benchmarks.device                    # on a machine with one GPU or TPU, in the root of a clone
    python -m benchmarks.device --only grouped     # the pieces whose name has this in it
    python -m benchmarks.device --small            # tiny shapes; on a CPU the kernels run in their interpreters
    python -m benchmarks.device --publish benchmarks/RESULTS.md

Every piece is a process of its own: a kernel that does not compile, hangs, crashes or is wrong costs its own line.
Results are written as they come, to DIR/device.json. Run again, it goes on with what was left out, and then tries
again what failed; what was right is kept, unless --again is given. The exit code is 1 if anything was wrong, failed,
hung or crashed.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from . import report
from .pieces import FAULTS, PIECES, Piece

ROOT = Path(__file__).parents[2]
START_SECONDS = 100  # limit for a process to begin its first case: imports, the device, the inputs' module
SETTLED = ("ok", "refused", "skipped")  # not tried again
IS_HERE = """
import json, sys, importlib.metadata, platform, jax
device = jax.devices()[0]
versions = {"python": platform.python_version()}
for name in ("jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "nvidia-cudnn-cu13", "torch"):
    try: versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: pass
memory = (device.memory_stats() or {}).get("bytes_limit")
kind = {"cuda": "gpu", "rocm": "gpu"}.get(device.platform, device.platform)
print("\\n" + json.dumps({"platform": kind, "chip": device.device_kind, "devices": jax.device_count(),
                         "memory GiB": memory and round(memory / 2**30, 1), "versions": versions}))
"""


class Run:
    """The results of one machine, in a file that is complete after every case."""

    def __init__(self, folder: Path, machine: dict, small: bool, again: bool):
        self.file = folder / "device.json"
        self.tried: set[tuple[str, str]] = set()  # in this run: what fails is not tried twice
        self.lock = threading.Lock()
        self.data = {"machine": machine, "small": small, "commit": commit(), "plans": {}, "cases": []}
        if self.file.exists() and not again:
            old = json.loads(self.file.read_text(encoding="utf-8"))
            if (old["machine"]["chip"], old["small"]) == (machine["chip"], small):
                self.data |= {"plans": old["plans"], "cases": old["cases"]}

    def status(self, piece: Piece) -> dict[str, str]:
        """{case: how it ended}, of the cases that were run."""
        return {case["case"]: case["status"] for case in self.data["cases"] if case["piece"] == piece.name}

    def missing(self, piece: Piece) -> list[str] | None:
        """Cases that were never run; None where it is not known what there is."""
        known = self.data["plans"].get(piece.name)
        return None if known is None else [name for name in known if name not in self.status(piece)]

    def plan(self, piece: Piece, names: list[str]) -> None:
        """The piece has these cases; results of others are from a time when it had them."""
        with self.lock:
            self.data["plans"][piece.name] = names
            self.data["cases"] = [x for x in self.data["cases"] if x["piece"] != piece.name or x["case"] in names]

    def add(self, piece: Piece, **case) -> None:
        now = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M:%S}"
        same = lambda old: (old["piece"], old["case"]) == (piece.name, case["case"])  # noqa: E731
        new = {"piece": piece.name, "date": now, "commit": self.data["commit"], **case}
        with self.lock:
            self.tried.add((piece.name, case["case"]))
            self.data["cases"] = [*(old for old in self.data["cases"] if not same(old)), new]
            self.write()
            print(report.line(new), flush=True)

    def write(self) -> None:
        """Whole or not at all, so that a run that is killed leaves what it had."""
        draft = self.file.with_suffix(".new")
        draft.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        draft.replace(self.file)


def commit() -> str:
    """The commit that is checked out, with a + where files differ from it; "" outside of a clone."""
    git = lambda *words: subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: E731
    try:
        return git("rev-parse", "--short=10", "HEAD").strip() + "+" * bool(git("status", "--porcelain").strip())
    except (OSError, subprocess.CalledProcessError):
        return ""


def environment(folder: Path, platform: str = "") -> dict[str, str]:
    """Of every process: the clone on its path, compiled programs kept for the next run, the CPU beside the chip."""
    given = dict(os.environ)
    given["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), given.get("PYTHONPATH")]))
    given.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
    given.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    platforms = given.get("JAX_PLATFORMS", "")
    if platforms and "cpu" not in platforms.split(","):
        given["JAX_PLATFORMS"] = f"{platforms},cpu"
    if platform == "cpu":
        given.setdefault("NPROC", "16")  # a simulated GPU kernel needs a thread of jax's CPU client per warpgroup
    return given


def machine(folder: Path) -> dict:
    """What is here, asked of a process of its own: a driver that hangs must not hang this one."""
    try:
        asked = subprocess.run(
            [sys.executable, "-c", IS_HERE], env=environment(folder), capture_output=True, text=True, timeout=180
        )
    except subprocess.TimeoutExpired:
        raise SystemExit("jax did not find its devices within three minutes: the driver hangs") from None
    if asked.returncode:
        raise SystemExit(f"jax cannot start here:\n{asked.stderr.strip()[-2000:]}")
    found = json.loads(asked.stdout.splitlines()[-1])
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    return found


def lines_of(process: subprocess.Popen) -> queue.Queue:
    """The process's lines as they come, then None."""
    lines: queue.Queue = queue.Queue()

    def read():
        for line in process.stdout:
            lines.put(json.loads(line))
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def one_process(piece: Piece, run: Run, folder: Path, until: float) -> bool:
    """Runs what the piece has left in one process. Returns whether another one should go on."""
    platform, log = run.data["machine"]["platform"], folder / "logs" / f"{piece.name.replace(' ', '_')}.txt"
    status = run.status(piece)
    done = [case for case in status if status[case] in SETTLED or (piece.name, case) in run.tried]
    command = [sys.executable, "-m", "benchmarks.device.worker", piece.name, platform]
    command += ["--small"] * run.data["small"] + ["--done", *done]
    with log.open("a", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(folder, platform), stdout=subprocess.PIPE, stderr=errors, text=True,
            start_new_session=True,
        )  # fmt: skip
    lines, begun, limit, now = lines_of(process), "-", START_SECONDS, time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.1, min(now + limit, until) - time.monotonic()))
            except queue.Empty:
                if time.monotonic() < until:
                    run.add(piece, case=begun, status="hung", seconds=limit, error=f"no end after {limit} s")
                return begun != "-" and time.monotonic() < until
            if line is None:
                break
            if "plan" in line:
                run.plan(piece, line["plan"])
            elif "begin" in line:
                begun, now = line["begin"], time.monotonic()
                limit = piece.case_seconds * (2 if platform == "cpu" else 1)
            else:
                run.add(piece, **line)
                begun = None
        code = process.wait()
        if begun is not None and (code or begun != "-"):
            why = f"the process ended with {signal.Signals(-code).name if code < 0 else code}\n"
            tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-report.LAST_LINES :]
            run.add(piece, case=begun, status="crashed", seconds=0, error=why + "\n".join(tail))
        left = [x for x in run.data["plans"].get(piece.name, ()) if x not in done and (piece.name, x) not in run.tried]
        return begun != "-" and bool(left)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_all(pieces: list[Piece], run: Run, folder: Path, until: float) -> list[str]:
    """Runs the pieces while there is time. Returns what was left out."""
    unsettled = lambda piece: [case for case, status in run.status(piece).items() if status not in SETTLED]  # noqa: E731
    # What was never run comes before what failed: something that hangs must not eat the same minutes again.
    new = [piece for piece in pieces if run.missing(piece) is None or (run.missing(piece) and not unsettled(piece))]

    def finish(piece):
        while time.monotonic() + 0.5 * piece.seconds < until and one_process(piece, run, folder, until):
            pass

    # A chip is for one process at a time; on a CPU the seconds mean nothing, and compiling takes one core.
    with concurrent.futures.ThreadPoolExecutor(2 if run.data["machine"]["platform"] == "cpu" else 1) as pool:
        list(pool.map(finish, new + [piece for piece in pieces if piece not in new and unsettled(piece)]))
    left = []
    for piece in pieces:
        missing = run.missing(piece)
        left += [piece.name] if missing is None else [f"{piece.name}: {case}" for case in missing]
    return left


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.device", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8, help="time to spend (default: %(default)s)")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="pieces with this in their name; again for more"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/device"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny shapes, also on a CPU")
    parser.add_argument("--again", action="store_true", help="run everything again, also what was right")
    parser.add_argument(
        "--faults", action="store_true", help="also pieces that go wrong on purpose, to test the command"
    )
    parser.add_argument("--list", action="store_true", help="print the pieces and how long they should take")
    parser.add_argument("--publish", type=Path, metavar="FILE", help="append what DIR holds to FILE, and run nothing")
    args = parser.parse_args(argv)
    if args.list:
        print(report.plan(PIECES))
        return 0
    if args.publish:
        return report.publish(args.out / "device.json", args.publish)
    if args.minutes <= 0:
        parser.error(f"--minutes {args.minutes:g}: give a number above 0")
    until, folder = time.monotonic() + 60 * args.minutes, args.out.resolve()
    pieces = [*(FAULTS if args.faults else ()), *PIECES]
    if args.only:
        pieces = [piece for piece in pieces if any(name in piece.name for name in args.only)]
        if not pieces:
            parser.error(f"--only {' '.join(args.only)}: no piece has that in its name; --list shows them")
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    here = machine(folder)
    if here["platform"] == "cpu" and not args.small:
        parser.error(f"jax finds no GPU or TPU here, only a CPU ({here['chip']}); --small runs everything on it")
    pieces = [piece for piece in pieces if here["platform"] in (*piece.on, "cpu")]
    print(report.machine(here), flush=True)
    run = Run(folder, here, args.small, args.again)
    left = run_all(pieces, run, folder, until)
    run.data["left out"] = left
    run.write()
    print("\n" + report.summary(run.data))
    print(f"\n{run.file}")
    return 1 if any(case["status"] not in SETTLED for case in run.data["cases"]) else 0


if __name__ == "__main__":
    sys.exit(main())
