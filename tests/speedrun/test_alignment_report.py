# SPDX-License-Identifier: Apache-2.0
"""The report of the stages after fine-tuning: seeds side by side, the tax, and what alignment_tax.py measures."""

import json

import pytest

from qwen2_jax.speedrun import report

pytest.importorskip("matplotlib")


def run(folder, scores, minutes=2.0, tax=()):
    """A finished run with an evaluation for each of `scores`."""
    (folder / "hf").mkdir(parents=True)
    lines = [
        {"step": 10 * i, "tokens": 0, "seconds": 60 * minutes, "held_out": held_out}
        for i, held_out in enumerate(scores)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tax:
        names = ("sums", "preferred", "prose")
        asked = [dict(zip(names, values, strict=True)) for values in tax]
        (folder / "tax.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))


def test_seeds_are_averaged_and_their_range_told(tmp_path):
    for name, end in (("grpo", 0.875), ("grpo_seed1", 0.75), ("grpo_seed2", 1.0)):
        run(tmp_path / name, [{"sums": {"reward": 0.5}}, {"sums": {"reward": end}}])
    (tmp_path / "dpo").mkdir()  # not finished: without a result
    path = report.write(tmp_path, tmp_path / "out")
    assert path.name == "post-training.md"
    text = path.read_text()
    assert "| GRPO: sums right | 50.0% (50.0% to 50.0%) | 87.5% (75.0% to 100.0%) | 2.0 | 3 |" in text
    assert "DPO:" not in text
    assert "alignment tax" not in text
    assert [png.name for png in (tmp_path / "out").glob("*.png")] == ["after-fine-tuning.png"]


def test_the_tax_is_told_beside_the_gain(tmp_path):
    run(tmp_path / "tax_adamw", [], tax=[(0.5, 0.8, 3.5), (0.75, 1.0, 3.75)], minutes=0)
    run(tmp_path / "tax_ondare", [], tax=[(0.5, 0.8, 3.5), (0.625, 0.9, 3.625)], minutes=0)
    text = report.write(tmp_path, tmp_path / "out").read_text()
    assert "| before | 50.0% | 80.0% | 3.500 | |" in text
    assert "| AdamW | 75.0% | 100.0% | 3.750 | 1 |" in text
    assert "| OnDARE | 62.5% | 90.0% | 3.625 | 1 |" in text
    assert [png.name for png in (tmp_path / "out").glob("*.png")] == ["alignment-tax.png"]
