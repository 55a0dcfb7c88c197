# SPDX-License-Identifier: Apache-2.0
"""Reward models: config.json, head, counts, and how one begins. LM.score has tests of its own in infer/."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen2_jax
from few import slow
from qwen2_jax import PRESETS, checkpoint, model
from qwen2_jax.checkpoint.formats import names as tensor_names
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.model import flops
from qwen2_jax.model import reward as score
from qwen2_jax.weights.params import count, leaves
from recorded import recorded_arrays
from tiny import CONFIGS, random_params
from tolerance import BFLOAT16, assert_no_worse

GOLDEN = Path(__file__).parents[1] / "golden"
HEADS = ("linear", "two_layers")
LABEL = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}


def rewarding(name: str, head: str) -> ModelConfig:
    return dataclasses.replace(CONFIGS[name], score_head=head)


# config.json


@pytest.mark.parametrize(("name", "prefix"), [("dense", "Qwen2For"), ("untied", "Qwen2For"), ("moe", "Qwen2MoeFor")])
@pytest.mark.parametrize(("head", "task"), [("linear", "SequenceClassification"), ("two_layers", "RewardModel")])
def test_architectures_name_the_head(name, prefix, head, task):
    config = rewarding(name, head)
    written = config.to_hf()
    assert written["architectures"] == [prefix + task]
    assert written.items() >= LABEL.items()
    assert "score_head" not in written
    assert ModelConfig.from_hf(written) == config
    assert config.scores
    words = CONFIGS[name].to_hf()
    assert not ModelConfig.from_hf(words).scores
    assert not words.keys() & LABEL.keys()


def test_labels_are_counted_as_transformers_counts_them():
    """num_labels, else the names; neither means 2 to transformers, and 1 in Qwen's own code."""
    read = lambda task, **more: ModelConfig.from_hf(
        CONFIGS["dense"].to_hf() | {"architectures": [f"Qwen2For{task}"]} | more
    )
    assert read("SequenceClassification", num_labels=1).score_head == "linear"
    assert read("RewardModel").score_head == "two_layers"
    two = {"id2label": {"0": "bad", "1": "good"}}
    for task, labels in (("SequenceClassification", {}), ("SequenceClassification", two), ("RewardModel", two)):
        with pytest.raises(UserError, match=rf"Qwen2For{task} has 2 labels .* supported: 1"):
            read(task, **labels)


def test_other_tasks_are_refused_and_other_classes_write_words():
    words = CONFIGS["dense"].to_hf()
    with pytest.raises(
        UserError, match="architectures is 'Qwen2ForTokenClassification'; supported: 'Qwen2ForCausalLM'"
    ):
        ModelConfig.from_hf(words | {"architectures": ["Qwen2ForTokenClassification"]})
    for names in (None, [], ["MyQwen2ForChat"]):
        assert ModelConfig.from_hf(words | {"architectures": names}) == CONFIGS["dense"]
    with pytest.raises(UserError, match="score_head is 'cubic'"):
        rewarding("dense", "cubic")


# The head


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", ["dense", "untied", "moe_mixed"])
def test_parameters_are_counted(name, head):
    config = rewarding(name, head)
    D = config.hidden_size
    specs = model.declare(config)[1]
    extra = {"linear": D, "two_layers": D * D + D + D + 1}[head]
    body = count({n: s for n, s in specs.items() if n != "score_head"})
    assert count(specs) == flops.parameters(config) == body + extra
    body_of_words = flops.parameters(CONFIGS[name]) - (0 if config.tie_word_embeddings else config.vocab_size * D)
    assert body == body_of_words
    matrices = {"linear": D, "two_layers": D * D + D}[head]
    layers = flops.matrix_parameters(CONFIGS[name]) - config.vocab_size * D
    assert flops.matrix_parameters(config) == layers + matrices


def test_the_two_layers_by_hand():
    """x = (1, 2): W x + b = (1 - 2 + 0.5, 3 + 2 - 1) = (-0.5, 4); relu (0, 4); 10 * 0 + 0.25 * 4 - 3 = -2."""
    config = dataclasses.replace(CONFIGS["dense"], hidden_size=2, head_dim=8, score_head="two_layers")
    graphdef, specs = model.declare(config)
    params = random_params(config)
    params["score_head"] = {
        "up_FD": jnp.array([[1.0, -1.0], [3.0, 1.0]]),
        "up_bias_F": jnp.array([0.5, -1.0]),
        "down_1F": jnp.array([[10.0, 0.25]]),
        "down_bias_1": jnp.array([-3.0]),
    }
    assert specs["score_head"].keys() == params["score_head"].keys()
    scores = nnx.merge(graphdef, params).score(jnp.array([[[1.0, 2.0]]]))
    np.testing.assert_array_equal(scores, [[-2.0]])


@pytest.mark.parametrize("head", HEADS)
def test_scores_are_float32_whatever_the_weights_are(head):
    config = rewarding("dense", head)
    params, exact = (random_params(config, dtype=dtype) for dtype in (jnp.bfloat16, np.float32))
    hidden_TD = np.random.default_rng(0).normal(size=(5, config.hidden_size))
    scores_T = nnx.merge(model.declare(config)[0], params).score(jnp.asarray(hidden_TD, jnp.bfloat16))
    assert (scores_T.dtype, scores_T.shape) == (jnp.float32, (5,))
    naive_T = by_hand(params["score_head"], np.asarray(jnp.asarray(hidden_TD, jnp.bfloat16), np.float64))
    assert_no_worse(scores_T, naive_T, by_hand(exact["score_head"], hidden_TD), floor=BFLOAT16)


def by_hand(head, hidden):
    """In numpy and float64."""
    head = {name: np.asarray(value, np.float64) for name, value in head.items()}
    if "weight_1D" in head:
        return hidden @ head["weight_1D"][0]
    up = np.maximum(hidden @ head["up_FD"].T + head["up_bias_F"], 0)
    return up @ head["down_1F"][0] + head["down_bias_1"][0]


def test_heads_are_not_taken_for_each_other():
    reward = nnx.merge(model.declare(rewarding("dense", "linear"))[0], random_params(rewarding("dense", "linear")))
    words = nnx.merge(model.declare(CONFIGS["dense"])[0], random_params(CONFIGS["dense"]))
    hidden = jnp.zeros((1, 48))
    with pytest.raises(UserError, match="this is a reward model"):
        reward.logits(hidden)
    with pytest.raises(UserError, match="this is a reward model"):
        reward.head_weight()
    with pytest.raises(UserError, match="has no score head"):
        words.score(hidden)


# Against transformers


@pytest.mark.parametrize("head", [*slow("linear"), "two_layers"])
def test_scores_are_those_of_transformers(head):
    folder = GOLDEN / f"score_{head}"
    recorded = recorded_arrays(folder / "golden.npz")
    talks = [row[:n].tolist() for row, n in zip(recorded["tokens"], recorded["lengths"], strict=True)]
    lm = qwen2_jax.load(folder, dtype="float32")
    assert lm.config.score_head == head
    np.testing.assert_allclose(lm.score(talks), recorded["scores"], rtol=0, atol=1e-4)  # 8.7e-6 of 15 was seen
    assert np.ptp(recorded["scores"]) > 0.1  # else the test would see little


@pytest.mark.slow  # quick: a saved reward model scores the same in test_score.py, int8 of models in test_forms.py
@pytest.mark.parametrize("head", HEADS)
def test_other_formats_and_int8_score_the_same(head, tmp_path):
    folder = GOLDEN / f"score_{head}"
    recorded = recorded_arrays(folder / "golden.npz")
    talks = [row[:n].tolist() for row, n in zip(recorded["tokens"], recorded["lengths"], strict=True)]
    lm = qwen2_jax.load(folder, dtype="float32")
    checkpoint.convert(folder, tmp_path / "orbax", "orbax")
    again = qwen2_jax.load(tmp_path / "orbax", dtype="float32")
    np.testing.assert_array_equal(again.score(talks), lm.score(talks))
    int8 = qwen2_jax.load(folder, dtype="int8").score(talks)
    assert np.abs(int8 - recorded["scores"]).max() < 0.1 * np.ptp(recorded["scores"])


# The beginning


@pytest.mark.parametrize(
    ("name", "head", "unroll"),
    [
        ("dense", "linear", False),
        *slow(("untied", "two_layers", True)),
        *slow(("dense", "two_layers", False), ("untied", "linear", False), ("untied", "two_layers", False)),
        *slow(("dense", "linear", True), ("dense", "two_layers", True), ("untied", "linear", True)),
    ],
)
def test_a_chat_model_becomes_a_reward_model(name, head, unroll):
    words = random_params(CONFIGS[name], unroll=unroll, dtype=jnp.bfloat16)
    params, config = score.from_language_model(words, CONFIGS[name], head, seed=3)
    assert config == rewarding(name, head)
    assert {p: v.shape for p, v in leaves(params)} == {
        p: s.shape for p, s in leaves(model.declare(config, unroll=unroll)[1])
    }
    assert "head_VD" not in params
    for path, value in leaves({n: v for n, v in words.items() if n != "head_VD"}):
        assert dict(leaves(params))[path] is value, "the backbone is shared"
    fresh = model.init(config, seed=3, dtype=jnp.bfloat16)["score_head"]
    jax.tree.map(np.testing.assert_array_equal, params["score_head"], fresh)
    for leaf, value in params["score_head"].items():
        assert value.dtype == jnp.bfloat16
        assert np.asarray(value, np.float32).any() == ("bias" not in leaf)
    other = score.from_language_model(words, CONFIGS[name], head, seed=4)[0]
    heads = map(jax.tree.leaves, (params["score_head"], other["score_head"]))
    assert any((a != b).any() for a, b in zip(*heads, strict=True))


def test_a_head_begins_with_scores_near_zero():
    config = dataclasses.replace(CONFIGS["dense"], hidden_size=384, initializer_range=0.03)
    words = {"final_norm_D": jnp.ones(384)}
    head = score.from_language_model(words, config, "two_layers")[0]["score_head"]
    np.testing.assert_allclose(np.std(head["up_FD"]), 0.03, rtol=0.02)
    np.testing.assert_allclose(np.std(head["down_1F"]), 0.2 / 384**0.5, rtol=0.15)
    hidden = np.random.default_rng(0).normal(size=(200, 384))
    for kind in HEADS:
        head = score.from_language_model(words, config, kind)[0]["score_head"]
        assert by_hand(head, hidden).std() < 0.22


@pytest.mark.parametrize("head", HEADS)
def test_the_beginning_inside_jit_is_the_same(head):
    words = random_params(CONFIGS["untied"])
    begin = lambda words: score.from_language_model(words, CONFIGS["untied"], head, seed=3)[0]
    jax.tree.map(np.testing.assert_array_equal, jax.jit(begin)(words), begin(words))


def test_a_reward_model_is_none_of_words():
    config = rewarding("dense", "linear")
    with pytest.raises(UserError, match="this is a reward model"):
        score.from_language_model(random_params(config), config, "linear")


def test_a_large_one_is_declared_in_its_layout():
    """Qwen2.5-Math-RM-72B: the names and shapes that its files have."""
    config = dataclasses.replace(PRESETS["qwen2.5-72b-instruct"], score_head="two_layers")
    table = tensor_names.table(model.declare(config)[1])
    assert {name: slot.shape for name, slot in table.items() if "layers" not in name} == {
        "model.embed_tokens.weight": (152064, 8192),
        "model.norm.weight": (8192,),
        "score.0.weight": (8192, 8192),
        "score.0.bias": (8192,),
        "score.2.weight": (1, 8192),
        "score.2.bias": (1,),
    }


ON_EIGHT_DEVICES = """
import dataclasses
import jax, numpy as np
from qwen2_jax.model import decoder as model, reward as score
from qwen2_jax.parallel import sharding
from qwen2_jax.infer.lm import LM
from tiny import CONFIGS, random_params
from tolerance import close

mesh = sharding.make_mesh(fsdp=4, tensor=2)
talks = [np.random.default_rng(n).integers(0, 96, n).tolist() for n in (70, 1, 9)]
for head in ("linear", "two_layers"):
    words = CONFIGS["untied"]
    place = lambda x, spec: jax.device_put(x, sharding.sharding(spec.axes, spec.shape, mesh))
    sharded = jax.tree.map(place, random_params(words), model.declare(words)[1])
    params, config = score.from_language_model(sharded, words, head)
    specs = model.declare(config)[1]["score_head"]
    for name, spec in specs.items():
        assert params["score_head"][name].sharding == sharding.sharding(spec.axes, spec.shape, mesh), name
    assert any(not leaf.is_fully_replicated for leaf in params["score_head"].values()), "nothing was split"
    alone = jax.tree.map(lambda x: jax.device_put(np.asarray(x), jax.devices()[0]), params)
    one = LM(config, alone, dtype="float32").score(talks)
    close(LM(config, params, dtype="float32", mesh=mesh).score(talks), one, units=64)
"""


@pytest.mark.slow
def test_on_a_mesh_the_head_lies_as_declared_and_scores_the_same():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(Path(__file__).parents[1])}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
