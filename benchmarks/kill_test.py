# SPDX-License-Identifier: Apache-2.0
"""Kills a training run at random moments until it is done, and compares it with an uninterrupted run.

    python benchmarks/kill_test.py --work FOLDER [--kills 20] [--command "python train.py configs/speedrun/kill.py"]

Runs COMMAND --out FOLDER/whole once to its end. Then runs COMMAND --out FOLDER/killed, sends it SIGKILL (which no
program can catch), and starts the same command again, --kills times; the last start runs to its end. Kills alternate
between three moments: while a checkpoint is being written; some steps after the start; while it starts, compiles or
restores. The last kill comes while the result is being written.

The command writes a line {"step": n, "loss": x, "batch": digest of its tokens, ...} per step to metrics.jsonl in its
folder, from step 1 on, and when it is continued the lines after its checkpoint anew. A kill is survived if the next
start continues from the newest checkpoint that was complete, and every line that it writes, however it ends, equals the
uninterrupted run's: the same loss to the last bit, and the same tokens, so none is seen twice or skipped. The result
has the uninterrupted run's weights, too. The output is also written to FOLDER/kill_test.log. Exit code 0: all kills
were survived, and, of at least MANY, some left a half-written checkpoint.
"""

import argparse
import dataclasses
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS, LAST = ("saving", "stepping", "starting"), "exporting"
PATIENCE = 600  # seconds to wait for an event
MANY = 20  # at least this many kills must have left a half-written checkpoint, or the test proves nothing


@dataclasses.dataclass
class Start:
    """One start of the command, how it ended, and what it left."""

    aim: str  # one of KINDS, LAST, or "the end"
    killed: bool
    lines: list[dict]  # of its metrics.jsonl
    complete: int  # the newest complete checkpoint, 0 if none
    half: bool  # whether there was also a half-written one


class Trainee:
    """The command as a child process, with a run folder."""

    def __init__(self, command: list[str], folder: Path):
        self.command, self.folder, self.output = command, folder, folder.with_name(f"{folder.name}.output")
        self.looked_at = 0  # when metrics.jsonl was written that was read last

    def start(self) -> None:
        with self.output.open("ab") as output:
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
            command = [*self.command, "--out", str(self.folder)]
            self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)

    def wait(self) -> None:
        """For its end. Ends this program too if the command failed."""
        if code := self.process.wait():
            tail = "\n".join(self.output.read_text("utf-8", "replace").splitlines()[-15:])
            sys.exit(f"the command failed with exit code {code}; the end of {self.output}:\n{tail}")

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """The condition holds, or the command has ended. Ends this program if neither happens for a long time."""
        end = time.monotonic() + PATIENCE
        while not condition() and self.process.poll() is None:
            if time.monotonic() > end:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
                sys.exit(f"in {PATIENCE} seconds the command did not get to {what}; {self.output} has what it printed")
            time.sleep(0.002)

    def stop(self, aim: str) -> Start:
        """Kills it and all that it started, if it is still there."""
        killed = self.process.poll() is None
        if killed:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        else:
            self.wait()
        names = [path.name for path in self.checkpoints()]
        complete = max((int(name) for name in names if name.isdecimal()), default=0)
        return Start(aim, killed, self.lines(), complete, self.saving())

    def lines(self) -> list[dict]:
        """The lines of single steps. A kill may have cut the last line; no other may be broken."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text("utf-8") if path.exists() else ""
        lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [line for line in lines if "loss" in line]

    def stepping(self, before: list[dict]) -> bool:
        """Whether a line was written since these were read; removing lines after the checkpoint does not count."""
        path = self.folder / "metrics.jsonl"
        now = path.stat().st_mtime_ns if path.exists() else 0
        changed, self.looked_at = now != self.looked_at, now
        return changed and continued_after(before, self.lines()) is not None

    def checkpoints(self) -> list[Path]:
        folder = self.folder / "checkpoints"
        return list(folder.iterdir()) if folder.exists() else []

    def saving(self) -> bool:
        return any(path.name.endswith(".orbax-checkpoint-tmp") for path in self.checkpoints())

    def exporting(self) -> bool:
        return (self.folder / "hf.unfinished").exists()

    def result(self) -> dict[str, bytes]:
        """The files of weights."""
        return {path.name: path.read_bytes() for path in (self.folder / "hf").glob("*.safetensors")}


def batch(line: dict) -> object:
    """The digest of the tokens of a line's step."""
    return line.get("batch", line.get("batches"))


def differences(lines: list[dict], whole: list[dict]) -> str:
    """Empty if these are the lines of the first steps of the uninterrupted run, with its losses and batches."""
    for n, line in enumerate(lines):
        if n == len(whole) or line["step"] != whole[n]["step"]:
            return f"line {n + 1} is about step {line['step']}"
        if batch(line) is None or batch(line) != batch(whole[n]):
            return f"step {line['step']}: batch {batch(line)}, undisturbed {batch(whole[n])}"
        if line["loss"] != whole[n]["loss"]:  # JSON gives floats back exactly: equal means the same bits
            return f"step {line['step']}: loss {line['loss']!r}, undisturbed {whole[n]['loss']!r}"
    return ""


def continued_after(before: list[dict], after: list[dict]) -> int | None:
    """The step after which a start wrote lines; None if it wrote none. Lines hold times, so new ones differ."""
    kept = 0
    while kept < min(len(before), len(after)) and before[kept] == after[kept]:
        kept += 1
    return after[kept]["step"] - 1 if kept < len(after) else None


def disturb(trainee: Trainee, aim: str, rng: random.Random, starting: float, stepping: float) -> Start:
    """Starts the command and kills it. starting: seconds to its first step; stepping: seconds of steps to allow."""
    before, left = trainee.lines(), trainee.saving()
    trainee.start()
    if aim == "starting":
        time.sleep(rng.uniform(0.1, starting))
    elif aim == LAST:
        trainee.wait_until(trainee.exporting, "its result")
        time.sleep(rng.uniform(0.0, 0.03))
    else:
        if left:  # by the kill before; the new start removes it
            trainee.wait_until(lambda: not trainee.saving(), "removing the half-written checkpoint")
        trainee.wait_until(lambda: trainee.stepping(before), "its first step")
        time.sleep(rng.uniform(0.0, stepping))
        if aim == "saving":
            trainee.wait_until(trainee.saving, "its next checkpoint")
            time.sleep(rng.uniform(0.0, 0.03))
    return trainee.stop(aim)


def too_easy(kills: int, halves: int) -> str:
    """Why surviving so many kills, of which so many left a half-written checkpoint, shows nothing; empty if it does."""
    if kills < MANY or halves:
        return ""
    return (
        f"none of {kills} kills left a half-written checkpoint, so nothing was shown about these: give another --seed"
    )


def arguments_of(description: str | None, kills: int) -> argparse.ArgumentParser:
    """The arguments of a test by killing. kills: how many where none are given."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="a new folder for the runs and the log")
    parser.add_argument("--kills", type=int, default=kills)
    parser.add_argument("--command", default=f"{shlex.quote(sys.executable)} train.py configs/speedrun/kill.py")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser


def new_log(work: Path, name: str) -> Callable[[str], None]:
    """Makes the folder `work`. What prints a line and adds it to the file of this name there."""
    if work.exists():
        sys.exit(f"{work} exists; give a new folder")
    work.mkdir(parents=True)

    def say(text: str) -> None:
        print(text, flush=True)
        with (work / name).open("a", encoding="utf-8") as log:
            log.write(text + "\n")

    return say


def undisturbed(calm: Trainee, say: Callable[[str], None]) -> tuple[list[dict], float, float]:
    """Runs the command to its end: its lines, seconds to the first of them, and seconds after it."""
    began = time.monotonic()
    calm.start()
    calm.wait_until(lambda: calm.stepping([]), "its first step")
    starting = time.monotonic() - began
    calm.wait()
    stepping = time.monotonic() - began - starting
    whole = calm.lines()
    say(f"undisturbed: {len(whole)} steps, {starting:.1f} s to the first line and {stepping:.1f} s after it")
    if not whole or batch(whole[0]) is None or [line["step"] for line in whole] != list(range(1, len(whole) + 1)):
        sys.exit(f"{calm.folder / 'metrics.jsonl'} must have one line per step, with its loss and batch")
    return whole, starting, stepping


def main(arguments: list[str] | None = None) -> int:
    options = arguments_of(__doc__, kills=20).parse_args(arguments)
    work = options.work.resolve()
    say = new_log(work, "kill_test.log")
    command, rng = shlex.split(options.command), random.Random(options.seed)
    say(f"command: {options.command}")
    calm = Trainee(command, work / "whole")
    whole, starting, stepping = undisturbed(calm, say)

    kills = survived = runs = halves = 0
    lost: list[str] = []
    while kills < options.kills:  # a run that is done too early is followed by another one
        runs += 1
        trainee = Trainee(command, work / f"killed{runs}")
        before = Start("", False, [], 0, False)
        while True:
            rest = options.kills - kills
            aim = KINDS[kills % len(KINDS)] if rest > 1 else LAST if rest else "the end"
            if aim == "the end":
                trainee.start()
                trainee.wait()
                now = trainee.stop(aim)
            else:
                now = disturb(trainee, aim, rng, starting, 1.4 * stepping / options.kills)
            after = continued_after(before.lines, now.lines)
            wrong = differences(now.lines, whole)
            if not wrong and after is not None and after != before.complete:
                wrong = f"continued after step {after}, but the checkpoint of step {before.complete} was complete"
            if not wrong and not now.killed and len(now.lines) != len(whole):
                wrong = f"ended after {len(now.lines)} of {len(whole)} steps"
            if not wrong and not now.killed and trainee.result() != calm.result():
                wrong = "the weights of its result are not those of the undisturbed run"
            if before.killed:
                survived += not wrong
            if wrong:
                lost.append(wrong)
            did = f"steps {after + 1} to {now.lines[-1]['step']}" if after is not None else "no step"
            half = ", a half-written one" if now.half else ""
            end = f"kill {kills + 1:2} while {aim}" if now.killed else "ran to its end"
            say(f"{end:24} {did:20} checkpoint {now.complete}{half}  {wrong or 'as undisturbed'}")
            kills += now.killed
            halves += now.half
            before = now
            if not now.killed:
                break
    say(f"{survived} of {kills} kills survived" + "".join(f"\n  {wrong}" for wrong in lost))
    if shown := too_easy(kills, halves):
        say(shown)
    return 0 if survived == kills and not lost and not shown else 1


if __name__ == "__main__":
    sys.exit(main())
