# SPDX-License-Identifier: Apache-2.0
"""Kills one process of a training run again and again, and compares the run with an uninterrupted one.

    python benchmarks/kill_host.py --work FOLDER [--kills 10] [--command "python train.py configs/speedrun/kill.py"]

The test of kill_test.py for a run of several processes, on one machine. Each process in turn is killed with SIGKILL,
also process 0, in which the coordinator runs: during steps, saves and starts. The others must exit by themselves within
the bound, with exit code 75 and a message that names the killed process; then the same commands continue from the
newest complete checkpoint, until the next kill, and the last start runs to its end. Every line of metrics must have the
loss of the uninterrupted run to the last bit, and the result must have its weights. The output is also written to
FOLDER/kill_host.log. Exit code 0: all of this held.
"""

import os
import random
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import kill_test

LOST = 75  # qwen2_jax.parallel.hosts.LOST
CONNECTED = " connected at "  # printed by process 0 when all processes are running
NAMES = "process {} on "  # in the others' message about the killed process


class Trainees(kill_test.Trainee):
    """The command as several child processes, with one run folder."""

    def __init__(self, command: list[str], folder: Path, *, processes: int, timeout: int, bound: float):
        super().__init__(command, folder)
        self.count, self.timeout, self.bound = processes, timeout, bound
        self.victim, self.told = 0, ""  # process to kill next, and how the last kill went

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        more = ["--out", str(self.folder), "--coordinator", f"127.0.0.1:{port}", "--processes", str(self.count)]
        more += ["--host-timeout", str(self.timeout)]
        self.outputs = [self.output.with_name(f"{self.output.name}.{i}") for i in range(self.count)]
        self.processes = []
        for i, path in enumerate(self.outputs):
            with path.open("wb") as output:
                streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
                command = [*self.command, *more, "--process", str(i)]
                self.processes.append(subprocess.Popen(command, cwd=kill_test.ROOT, start_new_session=True, **streams))
        self.process, self.output = self.processes[0], self.outputs[0].with_suffix("")

    def wait(self) -> None:
        for process, path in zip(self.processes, self.outputs, strict=True):
            if code := process.wait():
                tail = "\n".join(path.read_text("utf-8", "replace").splitlines()[-15:])
                sys.exit(f"the command failed with exit code {code}; the end of {path}:\n{tail}")

    def stop(self, aim: str) -> kill_test.Start:
        """Kills one process; the others must exit by themselves. `told` says how they did, empty if they did not."""
        victim = self.processes[self.victim]
        killed = all(process.poll() is None for process in self.processes)
        if killed:
            os.killpg(victim.pid, signal.SIGKILL)
            victim.wait()
            self.told = self._others(time.monotonic())
        else:
            self.wait()
        names = [path.name for path in self.checkpoints()]
        complete = max((int(name) for name in names if name.isdecimal()), default=0)
        return kill_test.Start(aim, killed, self.lines(), complete, self.saving())

    def _others(self, since: float) -> str:
        slowest = 0.0
        for i, process in enumerate(self.processes):
            if i == self.victim:
                continue
            try:
                code = process.wait(max(0.1, since + self.bound - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return ""
            slowest = time.monotonic() - since
            said = self.outputs[i].read_text("utf-8", "replace")
            if code != LOST or not said_who(said, self.victim):
                print(f"process {i} ended with code {code} and said:\n{said[-2000:]}", flush=True)
                return ""
        return f"{slowest:.1f} s"


def disturb(trainee: Trainees, aim: str, rng: random.Random, starting: float, stepping: float) -> kill_test.Start:
    """Starts the command and kills one process. starting: seconds to its first step; stepping: of steps to allow."""
    if aim != "starting":
        return kill_test.disturb(trainee, aim, rng, starting, stepping)
    trainee.start()  # before they are connected, the others wait for the killed process, and longer than the bound
    trainee.wait_until(lambda: CONNECTED in trainee.outputs[0].read_text("utf-8", "replace"), "all processes")
    time.sleep(rng.uniform(0.0, 0.5 * starting))
    return trainee.stop(aim)


def said_who(text: str, victim: int) -> bool:
    """Whether an error names the victim and says what to do."""
    return any(
        line.startswith("error: ") and NAMES.format(victim) in line and "The same command" in line
        for line in text.splitlines()
    )


def main(arguments: list[str] | None = None) -> int:
    parser = kill_test.arguments_of(__doc__, kills=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--host-timeout", type=int, default=10, help="of the command")
    parser.add_argument("--bound", type=float, default=60, help="seconds within which the others must have ended")
    options = parser.parse_args(arguments)
    work = options.work.resolve()
    say = kill_test.new_log(work, "kill_host.log")
    command, rng = shlex.split(options.command), random.Random(options.seed)
    say(f"command: {options.command}, {options.processes} processes")
    how = {"processes": options.processes, "timeout": options.host_timeout, "bound": options.bound}
    calm = Trainees(command, work / "whole", **how)
    whole, starting, stepping = kill_test.undisturbed(calm, say)

    trainee, before = Trainees(command, work / "killed", **how), kill_test.Start("", False, [], 0, False)
    survived = 0
    for kill in range(options.kills):
        # Every process is killed in every kind of moment before one is killed in the same kind again.
        aim = kill_test.KINDS[kill // options.processes % len(kill_test.KINDS)]
        trainee.victim, trainee.told = (kill + 1) % options.processes, ""
        now = disturb(trainee, aim, rng, starting, 0.7 * stepping / options.kills)
        if not now.killed:
            say("the run was done before it was killed so often; give a command with more steps")
            return 1
        after = kill_test.continued_after(before.lines, now.lines)
        wrong = kill_test.differences(now.lines, whole)
        if not wrong and after is not None and after != before.complete:
            wrong = f"continued after step {after}, but the checkpoint of step {before.complete} was complete"
        if not wrong and not trainee.told:
            wrong = f"the others did not end within {options.bound:.0f} s with a message that names it"
        survived += not wrong
        did = f"steps {after + 1} to {now.lines[-1]['step']}" if after is not None else "no step"
        head = f"kill {kill + 1:2} of process {trainee.victim} while {aim}"
        say(f"{head:35} {did:18} others ended after {trainee.told or '-':6} {wrong or 'as undisturbed'}")
        before = now
    trainee.start()
    trainee.wait()
    wrong = kill_test.differences(trainee.lines(), whole)
    if not wrong and len(trainee.lines()) != len(whole):
        wrong = f"ended after {len(trainee.lines())} of {len(whole)} steps"
    if not wrong and trainee.result() != calm.result():
        wrong = "the weights of its result are not those of the undisturbed run"
    say(f"ran to its end: {wrong or 'losses and weights as undisturbed'}")
    say(f"{survived} of {options.kills} kills survived")
    return 0 if survived == options.kills and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
