# SPDX-License-Identifier: Apache-2.0
"""The whole speedrun by one command: corpus, training, held-out answers after every stage, and a report of all of it.

    python configs/speedrun/run.py

On two CPU cores and without a network it takes about 80 minutes; docs/speedrun/report.md has each stage's. What is
done already is not done again: after an interruption the same command goes on. `--only pretrain` does one stage,
`--dry-run` prints the commands. Further words go to every training: `--steps 20` for a rehearsal, whose folder is to
be removed before the real run.
"""

import argparse
import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = Path("runs/speedrun")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training: a file beside this one, and what differs from it."""

    name: str  # of its run folder
    config: str
    flags: tuple[str, ...] = ()

    def command(self, more: list[str]) -> list[str]:
        return [sys.executable, str(HERE.parents[1] / "train.py"), str(HERE / self.config), *self.flags, *more]


STAGES = (
    Stage("pretrain", "pretrain.py"),
    Stage("long_context", "long_context.py"),
    Stage("upcycle", "upcycle.py"),
    Stage("moe", "moe.py"),
    # The comparison: the dense model on the tokens of the two stages above, in the same order.
    Stage("dense", "moe.py", ("--start.checkpoint", f"{RUNS}/long_context/hf", "--out", f"{RUNS}/dense")),
    Stage("sft", "sft.py"),
    Stage("sft_dense", "sft.py", ("--start.checkpoint", f"{RUNS}/dense/hf", "--out", f"{RUNS}/sft_dense")),
)


def commands(stages: list[Stage], more: list[str]) -> list[tuple[Path, list[str], bool]]:
    """(what it makes, the command, whether the file is the command's standard output), in order."""
    module = [sys.executable, "-m"]
    todo = [(RUNS / "data", [*module, "qwen2_jax.data.speedrun", str(RUNS / "data")], False)]
    for stage in stages:
        folder = RUNS / stage.name
        todo.append((folder / "hf", stage.command([] if stage.name == "upcycle" else more), False))
        asked = [*module, "qwen2_jax.eval.skills", "--ckpt", str(folder / "hf"), "--length", "1024"]
        todo.append((folder / "skills.jsonl", asked, True))
    return todo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would be run")
    options, more = parser.parse_known_args()
    report = [sys.executable, "-m", "qwen2_jax.eval.report", str(RUNS), str(RUNS / "report")]
    wanted = [stage for stage in STAGES if stage.name in options.only]
    for makes, command, printed in [*commands(wanted, more), (RUNS / "report", report, False)]:
        if makes.exists() and makes.name != "report":
            print(f"is there: {makes}", file=sys.stderr)
            continue
        print(f"$ {shlex.join(command)}{f' > {makes}' if printed else ''}", file=sys.stderr)
        if options.dry_run:
            continue
        done = subprocess.run(command, stdout=subprocess.PIPE if printed else None, text=True, check=False)
        if done.returncode or not (printed or makes.exists()):  # a training that was asked to stop makes nothing yet
            return done.returncode or 130
        if printed:
            makes.write_text(done.stdout, "utf-8")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)  # the stage that was stopped has said what there is to say
