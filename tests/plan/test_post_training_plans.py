# SPDX-License-Identifier: Apache-2.0
"""What post-training stages take: no logits of all tokens, a reference where one is compared with, and the sampling."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from ahead_of_time import GPU_COMPILER
from few import slow
from qwen2_jax import model
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.plan import online, train
from qwen2_jax.plan.shapes import is_spec
from qwen2_jax.rewards import RewardFunction as Function
from qwen2_jax.train import Dpo, Grpo, Lora, OnlineDpo, Optim, Policy, Reward, Sampling, Start
from qwen2_jax.train.stage import stage_of
from qwen2_jax.train.step import Trainer

WIDE = ModelConfig(
    vocab_size=16384, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
    num_key_value_heads=1, max_position_embeddings=8192, tie_word_embeddings=True,
)  # fmt: skip
PAIRS = Data(sources=(Source(path="pairs.jsonl"),), packing="best_fit")
COMMON = {"start": Start(checkpoint="qwen2-0.5b"), "optim": Optim(lr=1e-6), "steps": 4}
ASKED = {
    "data": PromptData(sources=("prompts.jsonl",), max_tokens=1024),
    "rewards": (Function(function="number"),),
    "prompts": 4,
    "sampling": Sampling(samples=2, max_new_tokens=1024, rows=8),
}
DPO = Dpo(data=PAIRS, rows=1, length=8192, reference="live", **COMMON)
GRPO = Grpo(policy=Policy(kl=0.1), length=8192, **ASKED, **COMMON)


@pytest.mark.parametrize("run", slow(DPO, GRPO), ids=["dpo", "grpo"])  # quick: the loss, test_cross_entropy.py
def test_logits_of_all_tokens_never_exist(run):
    """Neither in a step nor where log-probabilities alone are computed: both stay below half of them in bfloat16."""
    trainer = Trainer(run, WIDE, 4, objective=stage_of(run).objective(groups=4, ranks=2))
    kinds = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32, *[jnp.float32] * 4)
    batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct((1, 8192), dtype), kinds)
    weights = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.bfloat16), trainer.model_specs, is_leaf=is_spec
    )
    for lowered in (trainer.step.lower(trainer.abstract, batch), trainer.logprobs.lower(weights, batch)):
        used = lowered.compile().memory_analysis()
        assert used.temp_size_in_bytes < 8192 * WIDE.vocab_size * 2, f"{used.temp_size_in_bytes:,} bytes"


def test_who_has_a_reference_beside_the_step():
    specs = model.declare(WIDE)[1]
    mesh = AbstractMesh((2,), ("fsdp",))
    held = lambda run: online.beside(run, specs, mesh).get("reference", 0)
    weights = 2 * sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: model.init(WIDE))))
    assert weights / 2 <= held(DPO) < 0.51 * weights  # bfloat16, over two devices, norms on both
    assert held(GRPO) == held(OnlineDpo(**ASKED, **COMMON)) == held(DPO)
    assert held(dataclasses.replace(DPO, reference="cached")) == 0
    assert held(dataclasses.replace(DPO, lora=Lora(rank=2))) == 0  # the weights below the adapters are the reference
    assert held(dataclasses.replace(GRPO, policy=Policy())) == 0
    assert held(Reward(data=PAIRS, rows=1, length=8192, **COMMON)) == 0


@pytest.mark.parametrize(
    "run",
    [
        pytest.param(GRPO, id="grpo", marks=[*GPU_COMPILER, pytest.mark.slow]),
        pytest.param(
            Reward(data=PAIRS, rows=1, length=2048, **COMMON), id="reward", marks=[*GPU_COMPILER, pytest.mark.slow]
        ),
    ],
)
def test_plans_of_stages(run):
    plan = train.plan(run, "h100")
    assert plan.fits
    names = [part.program.name for part in plan.parts]
    assert names[0] == "training step"
    if isinstance(run, Grpo):
        step, sampling = plan.parts
        assert names[1] == "sampling, 8 answers at a time"
        assert sampling.times == 1024
        state = step.program.arguments["parameters"] + step.program.arguments["optimizer"]
        assert sampling.program.arguments["training's state"] == pytest.approx(state, rel=1e-3)
        assert sampling.program.arguments["reference"] == step.program.arguments["reference"]
    else:
        assert len(names) == 1
