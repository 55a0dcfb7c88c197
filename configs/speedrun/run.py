# SPDX-License-Identifier: Apache-2.0
"""The whole speedrun by one command: corpus, training, held-out answers after every stage, and a report of all of it.

    python configs/speedrun/run.py

On two CPU cores and without a network the stages up to fine-tuning take about 80 minutes; docs/speedrun/report.md has
each one's. What is done already is not done again: after an interruption the same command goes on. `--only pretrain`
does one stage, `--dry-run` prints the commands. The stages of post-training start from the bundled demo model and need
none of the others: `--only grpo`; docs/speedrun/post-training.md has theirs. Further words go to every training:
`--steps 20` for a rehearsal, whose folder is to be removed before the real run.
"""

import argparse
import dataclasses
import shlex
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RUNS = Path("runs/speedrun")
SEEDS = 3  # of the stages whose effect is measured more than once


@dataclasses.dataclass(frozen=True)
class SpeedrunStage:
    """One training: a file beside this one, and what differs from it."""

    name: str  # of its run folder
    config: str
    flags: tuple[str, ...] = ()
    data: str = "data"  # "tasks" for those after fine-tuning, whose questions post_training_data.py makes
    words: bool = True  # the result writes text, and does not score it
    start: str = "demo"  # what a stage after fine-tuning is compared with

    def command(self, more: list[str]) -> list[str]:
        return [sys.executable, str(HERE.parents[1] / "train.py"), str(HERE / self.config), *self.flags, *more]


def named(stage: str) -> list[str]:
    """Its run folders, one for each seed."""
    return [stage, *(f"{stage}_seed{seed}" for seed in range(1, SEEDS))]


def seed_flags(name: str, seed: int) -> tuple[str, ...]:
    return ("--seed", str(seed), "--out", f"{RUNS}/{name}") if seed else ()


STAGES = (
    SpeedrunStage("pretrain", "pretrain.py"),
    SpeedrunStage("long_context", "long_context.py"),
    SpeedrunStage("upcycle", "upcycle.py"),
    SpeedrunStage("moe", "moe.py"),
    # The comparison: the dense model on the tokens of the two stages above, in the same order.
    SpeedrunStage("dense", "moe.py", ("--start.checkpoint", f"{RUNS}/long_context/hf", "--out", f"{RUNS}/dense")),
    SpeedrunStage("sft", "sft.py"),
    SpeedrunStage("sft_dense", "sft.py", ("--start.checkpoint", f"{RUNS}/dense/hf", "--out", f"{RUNS}/sft_dense")),
    *(
        SpeedrunStage(name, f"{stage}.py", seed_flags(name, seed), "tasks", words=stage != "reward")
        for stage in ("reward", "dpo", "online_dpo", "grpo")
        for seed, name in enumerate(named(stage))
    ),
    # How much the loss of pre-training text rises when the model learns to add, with and without online merging.
    SpeedrunStage("prose", "prose.py", data="tasks"),
    *(
        SpeedrunStage(name, f"tax_{method}.py", seed_flags(name, seed), "tasks", start=f"{RUNS}/prose/hf")
        for method in ("adamw", "ondare")
        for seed, name in enumerate(named(f"tax_{method}"))
    ),
)


def commands(stages: list[SpeedrunStage], more: list[str]) -> list[tuple[Path, list[str], bool]]:
    """(what it makes, the command, whether the file is the command's standard output), in order."""
    module = [sys.executable, "-m"]
    makers = {"data": "qwen2_jax.speedrun.corpus", "tasks": "qwen2_jax.speedrun.post_training_data"}
    todo = []
    for data in dict.fromkeys(stage.data for stage in stages):
        todo.append((RUNS / data, [*module, makers[data], str(RUNS / data)], False))
    for stage in stages:
        folder = RUNS / stage.name
        todo.append((folder / "hf", stage.command([] if stage.name == "upcycle" else more), False))
        if stage.data == "data":
            asked = [*module, "qwen2_jax.speedrun.accuracy", "--ckpt", str(folder / "hf"), "--length", "1024"]
            todo.append((folder / "skills.jsonl", asked, True))
        elif stage.words:
            todo.append(
                (
                    folder / "tax.jsonl",
                    [*module, "qwen2_jax.speedrun.alignment_tax", stage.start, str(folder / "hf")],
                    True,
                )
            )
    return todo


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--dry-run", action="store_true", help="print the commands that would be run")
    options, more = parser.parse_known_args()
    report = [sys.executable, "-m", "qwen2_jax.speedrun.report", str(RUNS), str(RUNS / "report")]
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
