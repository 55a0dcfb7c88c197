# SPDX-License-Identifier: Apache-2.0
"""config.json as strangers write it: the model that it describes, or one line that names the key and what to give."""

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest

from mutations import mutated_json, right_or_refused
from qwen2_jax import checkpoint
from qwen2_jax.config import FULL, ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.infer.engine.buckets import context_limit
from qwen2_jax.model import declare, rope
from qwen2_jax.weights.params import count, leaves

FAULTS = Path(__file__).parents[3] / "shared" / "data" / "faults"
DENSE = {
    "architectures": ["Qwen2ForSequenceClassification"], "id2label": {"0": "LABEL_0"}, "model_type": "qwen2",
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": None, "hidden_act": "silu", "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True, "use_sliding_window": True,
    "sliding_window": 64, "max_window_layers": 1, "layer_types": ["full_attention", "sliding_attention"],
    "initializer_range": 0.02, "attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": [1, 2],
    "torch_dtype": "bfloat16", "use_cache": True, "quantization_config": None, "is_causal": True,
    "rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
        "mscale": 0.7, "mscale_all_dim": 0.8, "truncate": True,
    },
}  # fmt: skip
SPARSE = DENSE | {
    "architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12, "norm_topk_prob": False, "rope_scaling": None,
    "decoder_sparse_step": 1, "mlp_only_layers": [1], "router_aux_loss_coef": 0.001, "output_router_logits": False,
    "dual_chunk_attention_config": {"chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 48},
    "rope_parameters": {"rope_type": "linear", "factor": 2, "rope_theta": 1e6, "partial_rotary_factor": 1.0},
}  # fmt: skip
SPARSE.pop("rope_theta")


def used(content: bytes) -> ModelConfig:
    """Reads a config and makes from it what loading makes before the first weight."""
    config = ModelConfig.from_hf(parse_json_object(content, "config.json"))
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
    assert hash(config) == hash(config) and all(1 <= window <= FULL for window in config.windows)
    for mode in rope.MODES:
        limit = context_limit(config, mode)
        assert config.max_position_embeddings <= limit <= FULL
        tables = rope.choose(config, [1, config.trained_length, limit], mode)
        for array in (tables.inv_freq_Bf, tables.amplitude_B, tables.logit_scale(np.array([1, 2, limit], np.int32))):
            assert np.isfinite(array).all()
    specs = declare(config)[1]
    assert count(specs) == sum(math.prod(spec.shape) for _, spec in leaves(specs)) > 0
    return config


@pytest.mark.parametrize("good", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.filterwarnings("ignore:the config has|sparse_attention settings")
def test_mutations(mutations, good):
    assert used(json.dumps(good).encode()).num_hidden_layers == 2
    for seed in mutations:
        right_or_refused(seed, lambda seed=seed: used(mutated_json(seed, good)))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("config-beta0", ["rope_scaling", "beta_fast is 0.0", "above 0.0"]),
        ("config-factor-big", ["rope_scaling", "factor is 1e+308", "finite in float32"]),
        ("config-huge-int", ["rms_norm_eps is an integer of 401 digits"]),
        ("config-id2label", ["id2label is 7", "an object of labels"]),
        ("config-layers", ["num_hidden_layers is 2147483648", "at most 512"]),
    ],
)
def test_reported_faults_name_file_key_and_what_is_allowed(case, words):
    folder = FAULTS / case
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    with pytest.raises(UserError) as caught:
        checkpoint.read_config(checkpoint.Source("hf", folder))
    for word in [str(folder / "config.json"), *words]:
        assert word in str(caught.value)


def test_a_window_beyond_every_position_is_none():
    config = used(json.dumps(DENSE | {"sliding_window": 2**40}).encode())
    assert config.windows == (FULL, FULL) and config.to_hf()["sliding_window"] == 2**40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"is_causal": False}, ["is_causal is False", "True"]),
        ({"architectures": "Qwen2ForCausalLM"}, ["architectures", "a list of names"]),
        ({"num_labels": "1"}, ["num_labels is '1'"]),
        ({"rope_theta": 1.0}, ["rope_theta is 1.0", "above 1.0"]),
        ({"rms_norm_eps": 1e39}, ["rms_norm_eps is 1e+39", "finite in float32"]),
        ({"eos_token_id": 2**31}, ["eos_token_id is 2147483648"]),
        ({"torch_dtype": ""}, ["dtype is ''", "'bfloat16'"]),
        ({"head_dim": 2**20}, ["head_dim is 1048576", "at most 16,384"]),
        ({"max_position_embeddings": 2**30}, ["max_position_embeddings", "at most 268,435,456"]),
        ({"rope_scaling": {"type": "yarn", "factor": 1e9}}, ["factor is 1e+09", "256 tokens"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "beta_slow": 1e-300}}, ["beta_slow", "above 0.0"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "mscale": 1e20}}, ["mscale", "at most 1,000"]),
        ({"dual_chunk_attention_config": {"chunk_size": 2**31}}, ["chunk_size", "at most"]),
    ],
)
def test_numbers_and_types_have_bounds(changes, words):
    with pytest.raises(UserError) as caught:
        used(json.dumps(DENSE | changes).encode())
    for word in words:
        assert word in str(caught.value)


def test_experts_of_all_layers_together():
    with pytest.raises(UserError, match="num_experts is 4000 in 100 layers; supported: at most 100,000"):
        used(json.dumps(SPARSE | {"num_experts": 4000, "num_hidden_layers": 100, "layer_types": None}).encode())


def test_many_unknown_keys_are_few_warnings():
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        used(json.dumps(DENSE | {f"key{i}": i for i in range(5000)} | {"a\nb": 1}).encode())
    assert len(seen) == 21 and "\n" not in "".join(str(one.message) for one in seen)
    assert "4981 more keys" in str(seen[-1].message)
