# SPDX-License-Identifier: Apache-2.0
"""A stage of training is one file: a config that brings its own dataclass and Stage runs like any other."""

import dataclasses
import io

import pytest
from rich.console import Console

from qwen2_jax.errors import UserError
from qwen2_jax.observe.lines import read
from qwen2_jax.train import config_file, recipes
from qwen2_jax.train.config import Run
from qwen2_jax.train.post_training_config import Online
from qwen2_jax.train.stage import stage_of

OWN = '''
"""A stage in one file."""
import dataclasses
from pathlib import Path

from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.train import Evaluation, Logging, Optim
from qwen2_jax.train.config import Run
from qwen2_jax.train.objectives.batch_losses import NextToken
from qwen2_jax.train.stage import Stage


class CalmStage(Stage):
    def objective(self, *, groups=1, ranks=1):
        return NextToken(z_loss=self.run.calm)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calm(Run):
    stage = CalmStage
    data: Data
    calm: float = 1e-2


TEXT = Source(path="{text}")
config = Calm(
    model=ModelConfig(vocab_size=384, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True),
    tokenizer="{tokenizer}", data=Data(sources=(TEXT,)), rows=2, length=32, steps=2, optim=Optim(lr=1e-2),
    dtype="float32", remat=None, evaluation=Evaluation(sources=(TEXT,), batches=1), log=Logging(every=1),
    out=Path("{out}"),
)
'''


@pytest.fixture
def own(corpus, tmp_path):
    file = tmp_path / "calm.py"
    places = {"text": corpus / "text.jsonl", "tokenizer": corpus / "tokenizer", "out": tmp_path / "out"}
    file.write_text(OWN.format(**places))
    return file


def test_a_stage_in_a_config_file_takes_flags_and_is_prepared(own):
    config = config_file.load(own, ["--calm", "0.5"])
    assert isinstance(config, Run)
    assert stage_of(config).objective().z_loss == 0.5
    console = Console(file=io.StringIO())
    assert recipes.run(dataclasses.replace(config, dry_run=True), console) is None
    assert "dry run" in console.file.getvalue()
    assert not (config.out / "checkpoints").exists()


@pytest.mark.slow  # quick: the loop trains and evaluates other stages, test_loop.py and test_post_training.py
def test_a_stage_in_a_config_file_trains_and_evaluates(own):
    config = config_file.load(own, [])
    assert recipes.run(config, Console(file=io.StringIO())) == config.out / "hf"
    lines = read(config.out / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert [line["held_out"].keys() for line in lines if "held_out" in line] == [{"text"}]


@pytest.mark.parametrize("kind", [Run, Online])
def test_a_base_class_names_no_stage(kind):
    with pytest.raises(UserError, match=f"{kind.__name__} is no stage of training"):
        stage_of(object.__new__(kind))
