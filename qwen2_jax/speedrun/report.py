# SPDX-License-Identifier: Apache-2.0
"""One report of the speedrun's stages: cost, held-out losses, accuracy and curves.

python -m qwen2_jax.speedrun.report runs/speedrun docs/speedrun

Writes report.md and its plots into the second folder, from the results of the stages in the first: hf/, metrics.jsonl
and skills.jsonl of each. Missing stages are left out. The stages after fine-tuning are in post-training.md
(alignment_report.py).
"""

import dataclasses
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path

import tyro

from qwen2_jax import checkpoint
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError, run_and_exit
from qwen2_jax.model.flops import active_parameters, parameters
from qwen2_jax.observe import plots
from qwen2_jax.observe.lines import Line, read
from qwen2_jax.speedrun import alignment_report

STAGES = {
    "pretrain": "dense model from random weights, rows of 256 tokens",
    "long_context": "context 256 to 1,024 tokens, rotary base 1e4 to 1e6",
    "upcycle": "mixture of experts made from it, without training",
    "moe": "continued training of the mixture of experts",
    "dense": "for comparison, the dense model on the same tokens",
    "sft": "fine-tuning of the mixture of experts on chats",
    "sft_dense": "the same fine-tuning of the dense model",
}
SKILLS = {
    "sums": "sums",
    "compare": "larger of two",
    "copy": "copying",
    "recall": "recall",
    "recall_named": "recall by name",
}
# (title, file, {label: stage}) of plots that compare runs
COMPARED = (
    ("Dense and upcycled model, the same tokens", "moe-or-dense", {"dense": "dense", "upcycled": "moe"}),
    ("Fine-tuning", "fine-tuning", {"dense": "sft_dense", "upcycled": "sft"}),
)


@dataclasses.dataclass(frozen=True)
class ReportedStage:
    """The results of one stage."""

    name: str
    config: ModelConfig
    lines: list[Line]  # of its metrics; empty if nothing was trained
    skills: dict[str, float]  # exact-match accuracy on held-out questions

    @classmethod
    def of(cls, folder: Path) -> "ReportedStage":
        metrics, answers = folder / "metrics.jsonl", folder / "skills.jsonl"
        asked = [json.loads(line) for line in answers.read_text("utf-8").splitlines()] if answers.exists() else []
        return cls(
            folder.name,
            checkpoint.read_config(checkpoint.locate(folder / "hf")),
            read(metrics) if metrics.exists() else [],
            {line["skill"]: line["accuracy"] for line in asked},
        )

    def held_out(self, position: int) -> dict[str, float]:
        """Source -> loss in nats per target, of the first (0) or last (-1) evaluation; empty if there was none."""
        scored = [line["held_out"] for line in self.lines if "held_out" in line]
        return {name: score["loss"] for name, score in scored[position].items()} if scored else {}

    @property
    def tokens(self) -> int:
        return max((line["tokens"] for line in self.lines), default=0)

    @property
    def minutes(self) -> float:
        return max((line["seconds"] for line in self.lines), default=0.0) / 60


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are right-aligned."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows))


def _cell(values: dict[str, float], name: str, form: str) -> str:
    return format(values[name], form) if name in values else "-"


def costs(stages: Sequence[ReportedStage]) -> str:
    """Sizes, tokens and time of each stage."""
    rows = [
        [
            f"{stage.name}: {STAGES[stage.name]}",
            f"{parameters(stage.config) / 1e6:.2f} M",
            f"{active_parameters(stage.config) / 1e6:.2f} M",
            f"{stage.tokens / 1e6:.2f} M" if stage.tokens else "-",
            f"{stage.minutes:.1f}" if stage.lines else "-",
        ]
        for stage in stages
    ]
    total = [f"**{sum(stage.tokens for stage in stages) / 1e6:.2f} M**", f"**{sum(s.minutes for s in stages):.1f}**"]
    return table(["stage", "parameters", "active", "tokens", "minutes"], [*rows, ["**together**", "", "", *total]])


def losses(stages: Sequence[ReportedStage]) -> str:
    """Held-out losses at the end of every stage, and, where measured, before the first step."""
    sources = list(dict.fromkeys(name for stage in stages for name in stage.held_out(-1)))
    rows = []
    for stage in stages:
        first = [line for line in stage.lines if "held_out" in line and line["step"] == 0]
        for when, values in (("before", stage.held_out(0) if first else {}), ("after", stage.held_out(-1))):
            if values:
                rows.append([f"{when} {stage.name}", *(_cell(values, name, ".3f") for name in sources)])
    return table(["nats per target", *sources], rows)


def answers(stages: Sequence[ReportedStage]) -> str:
    """Accuracy of greedy answers after every stage."""
    return table(
        ["after", *SKILLS.values()],
        [[stage.name, *(_cell(stage.skills, name, ".1%") for name in SKILLS)] for stage in stages if stage.skills],
    )


def effects(stages: dict[str, ReportedStage]) -> list[str]:
    """One line per comparison of stages."""

    def compare(
        what: str, after: str, before: str, values: Callable[[ReportedStage], dict[str, float]], form: str
    ) -> str:
        a, b = values(stages[after]), values(stages[before])
        numbers = [f"{name} {b[name]:{form}} to {a[name]:{form}}" for name in a if name in b]
        return f"- {what}: {', '.join(numbers)}."

    found = []
    if {"moe", "dense"} <= stages.keys():
        what = "Upcycled against dense after the same tokens, held-out loss, from dense"
        found.append(compare(what, "moe", "dense", lambda stage: stage.held_out(-1), ".3f"))
    for after, before in (("sft", "moe"), ("sft_dense", "dense")):
        if {after, before} <= stages.keys():
            what = f"Fine-tuning, answers right, from {before} to {after}"
            named = lambda stage: {SKILLS[name]: share for name, share in stage.skills.items()}  # noqa: E731
            found.append(compare(what, after, before, named, ".1%"))
    return found


def machine() -> str:
    """Processor, cores and versions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores, jax {version('jax')}, Python {platform.python_version()}"


def write(runs: Path, out: Path) -> Path:
    """Writes the reports of the stages found in `runs` into the folder `out`: report.md, and post-training.md for those
    after fine-tuning. Returns the path of the first one written."""
    written = f"Written by `python -m qwen2_jax.speedrun.report` from the runs themselves. {date.today()}, {machine()}."
    stages = {name: ReportedStage.of(runs / name) for name in STAGES if (runs / name / "hf").is_dir()}
    later = alignment_report.write(runs, out, written)
    if not stages:
        if later is None:
            every = ", ".join((*STAGES, *alignment_report.MEASURED))
            raise UserError(f"{runs} has none of the stages {every}; run configs/speedrun/run.py first")
        return later
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    if "pretrain" in stages:
        plots.draw(runs / "pretrain/metrics.jsonl", out / "pretrain.png")
        pictures.append(("Pre-training", "pretrain"))
    for title, file, compared in COMPARED:
        if set(compared.values()) <= stages.keys():
            runs_of = [(label, runs / stage / "metrics.jsonl") for label, stage in compared.items()]
            plots.overlay(runs_of, out / f"{file}.png", title=title)
            pictures.append((title, file))
    found = list(stages.values())
    parts = [
        "# The speedrun, measured",
        written,
        *([] if later is None else [f"Stages after fine-tuning: [{later.name}]({later.name})."]),
        "## Stages",
        costs(found),
        "Minutes are those of the training processes, with compiling, evaluating and saving, without imports.",
        "## Held-out loss",
        f"{losses(found)}\n\nEach stage packs held-out texts into rows as its own: what follows a row's end has lost"
        "\nits beginning. Comparable are before and after, moe and dense, sft and sft_dense.",
        "## Held-out questions",
        f"{answers(found)}\n\nGreedy answers that equal the expected one to the last letter. Texts in which a code is"
        "\nhidden have up to 1,024 tokens at every stage, also where the model was trained on 256.",
        "## Effects",
        "\n".join(effects(stages)),
        "## Curves",
        "\n\n".join(f"![{title}]({file}.png)" for title, file in pictures),
    ]
    report = out / "report.md"
    report.write_text("\n\n".join(parts) + "\n", "utf-8")
    return report


def main(runs: tyro.conf.Positional[Path], out: tyro.conf.Positional[Path]) -> int:
    """Writes report.md and its plots into the folder `out`, from the speedrun's folder."""
    print(f"wrote {write(runs, out)}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run_and_exit(lambda: tyro.cli(main))
