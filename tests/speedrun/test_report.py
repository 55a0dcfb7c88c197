# SPDX-License-Identifier: Apache-2.0
"""The speedrun's report: numbers of the runs in the right cells, and stages that are missing left out."""

import json
from pathlib import Path

import pytest

from qwen2_jax import checkpoint
from qwen2_jax.errors import UserError
from qwen2_jax.speedrun import accuracy as skills
from qwen2_jax.speedrun import report, stdlib_text
from qwen2_jax.tokenizer import Tokenizer
from tiny import CONFIGS, random_params

pytest.importorskip("matplotlib")


def stage(folder, config, *, loss, skills=None):
    """A run's folder with two evaluations, at the first step and the last."""
    config = CONFIGS[config]
    checkpoint.save_hf(folder / "hf", config, random_params(config))
    before, after = {"loss": loss + 1, "accuracy": 0.1}, {"loss": loss, "accuracy": 0.2}
    lines = [
        {"step": 0, "tokens": 0, "seconds": 1.0, "held_out": {"prose": before}},
        {"step": 1, "tokens": 500_000, "seconds": 60.0, "loss": 2.0, "learning_rate": 1.0},
        {"step": 2, "tokens": 1_000_000, "seconds": 120.0, "loss": 2.0, "learning_rate": 1.0},
        {"step": 2, "tokens": 1_000_000, "seconds": 150.0, "held_out": {"prose": after}},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if skills:
        text = "".join(json.dumps({"skill": n, "accuracy": a, "items": 10}) + "\n" for n, a in skills.items())
        (folder / "skills.jsonl").write_text(text)


def rows(text):
    """The cells of all tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def test_numbers_of_every_stage(tmp_path):
    stage(tmp_path / "dense", "dense", loss=3.5, skills={"sums": 0.5, "copy": 0.25})
    stage(tmp_path / "moe", "moe", loss=3.25, skills={"sums": 0.75})
    stage(tmp_path / "sft", "moe", loss=3.0, skills={"sums": 1.0})
    text = report.write(tmp_path, tmp_path / "out").read_text()
    found = rows(text)
    sizes = next(row for row in found if row[0].startswith("moe:"))
    assert sizes[3:] == ["1.00 M", "2.5"]
    assert float(sizes[1].split()[0]) > float(sizes[2].split()[0])  # a token meets some of the experts
    assert ["**together**", "", "", "**3.00 M**", "**7.5**"] in found
    assert ["before moe", "4.250"] in found
    assert ["after moe", "3.250"] in found
    assert ["dense", "50.0%", "-", "25.0%", "-", "-"] in found
    assert "from dense: prose 3.500 to 3.250." in text
    assert "from moe to sft: sums 75.0% to 100.0%." in text
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == ["moe-or-dense.png"]
    assert all(f"({name})" in text for name in pictures)


def test_skills_that_cannot_be_asked_are_told(monkeypatch):
    """Nothing fits into 32 tokens beside its answer; and no items are no measurement."""
    one_package = stdlib_text.stdlib_documents(Path(json.__file__).parent)
    monkeypatch.setattr(stdlib_text, "stdlib_documents", lambda: one_package)
    tokenizer = Tokenizer.from_folder(checkpoint.locate("demo").path)
    with pytest.raises(UserError, match="0 different items of sums found, 3 asked for"):
        skills.HeldOut(tokenizer, length=32).items("sums", 3)
    with pytest.raises(UserError, match="items is 0"):
        skills.main(items=0)


def test_nothing_to_report(tmp_path):
    with pytest.raises(UserError, match=r"run configs/speedrun/run.py first"):
        report.write(tmp_path, tmp_path / "out")
