# SPDX-License-Identifier: Apache-2.0
"""ModelConfig: the presets, both spellings of config.json, what is refused, windows and stacks."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from few import MANY
from qwen2_jax.config import FULL, HUB_IDS, PRESETS, DualChunk, LayerScan, ModelConfig, RopeScaling
from qwen2_jax.errors import UserError
from qwen2_jax.model import flops

DATA = Path(__file__).parents[3] / "shared" / "data"
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
DENSE_FILE = {"model_type": "qwen2", **TINY}
SPARSE_FILE = {"model_type": "qwen2_moe", **TINY, **EXPERTS}

# One value per field that is not its default, with the fields it needs beside it.
MUTATIONS = {
    "model_type": {"model_type": "qwen2"},
    "vocab_size": {"vocab_size": 97},
    "hidden_size": {"hidden_size": 64, "head_dim": 8},
    "intermediate_size": {"intermediate_size": 49},
    "num_hidden_layers": {"num_hidden_layers": 5},
    "num_attention_heads": {"num_attention_heads": 8, "head_dim": 8},
    "num_key_value_heads": {"num_key_value_heads": 1},
    "head_dim": {"head_dim": 16},
    "max_position_embeddings": {"max_position_embeddings": 77},
    "rms_norm_eps": {"rms_norm_eps": 1e-3},
    "rope_theta": {"rope_theta": 123.0},
    "rope_scaling": {"rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=64)},
    "dual_chunk_attention_config": {"dual_chunk_attention_config": DualChunk(chunk_size=16, local_size=4)},
    "tie_word_embeddings": {"tie_word_embeddings": True},
    "qkv_bias": {"qkv_bias": False},
    "use_sliding_window": {"use_sliding_window": True},
    "sliding_window": {"sliding_window": 7},
    "max_window_layers": {"max_window_layers": 2},
    "layer_types": {"layer_types": ("sliding_attention",) + ("full_attention",) * 3, "use_sliding_window": True},
    "initializer_range": {"initializer_range": 0.5},
    "attention_dropout": {"attention_dropout": 0.25},
    "bos_token_id": {"bos_token_id": 1},
    "eos_token_id": {"eos_token_id": (1, 2)},
    "pad_token_id": {"pad_token_id": 3},
    "num_experts": {"num_experts": 7},
    "num_experts_per_tok": {"num_experts_per_tok": 3},
    "moe_intermediate_size": {"moe_intermediate_size": 17},
    "shared_expert_intermediate_size": {"shared_expert_intermediate_size": 25},
    "norm_topk_prob": {"norm_topk_prob": True},
    "decoder_sparse_step": {"decoder_sparse_step": 2},
    "mlp_only_layers": {"mlp_only_layers": (1,)},
    "router_aux_loss_coef": {"router_aux_loss_coef": 0.5},
    "output_router_logits": {"output_router_logits": True},
    "score_head": {"score_head": "two_layers"},
    "dtype": {"dtype": "bfloat16"},
}
ONE_VALUE = {"hidden_act"}  # fields of which only one value is supported


def config(**changes) -> ModelConfig:
    return ModelConfig(**{**TINY, **changes})


def sparse(**changes) -> ModelConfig:
    return config(model_type="qwen2_moe", **{**EXPERTS, **changes})


def as_json(data: dict) -> dict:
    return json.loads(json.dumps(data))


# Presets


def test_presets_agree_with_the_published_table():
    path = DATA / "qwen_configs.json"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    columns = {
        "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
        "kv": "num_key_value_heads", "ff": "intermediate_size", "vocab": "vocab_size", "tie": "tie_word_embeddings",
        "theta": "rope_theta", "eps": "rms_norm_eps", "max_pos": "max_position_embeddings",
        "sliding_window": "sliding_window", "max_window_layers": "max_window_layers", "bos": "bos_token_id",
        "eos": "eos_token_id", "moe_ff": "moe_intermediate_size", "shared_ff": "shared_expert_intermediate_size",
        "experts": "num_experts", "top_k": "num_experts_per_tok", "norm_topk_prob": "norm_topk_prob",
        "decoder_sparse_step": "decoder_sparse_step", "mlp_only_layers": "mlp_only_layers",
        "router_aux_loss_coef": "router_aux_loss_coef", "dual_chunk_attention_config": "dual_chunk_attention_config",
    }  # fmt: skip
    table = {name: row for name, row in json.loads(path.read_text()).items() if name[0] != "_"}
    assert {f"Qwen/{name}" for name in table} == set(HUB_IDS.values())
    assert {name.lower() for name in table} == set(PRESETS)
    for name, row in table.items():
        preset = PRESETS[name.lower()]
        for column, value in row.items():
            if isinstance(value, str):  # "unverified ..."
                continue
            got = getattr(preset, columns[column])
            want = DualChunk(**value) if isinstance(value, dict) else tuple(value) if isinstance(value, list) else value
            assert got == want, (name, column)
        assert preset.dtype == "bfloat16"
        assert not preset.use_sliding_window
        assert preset.head_dim * preset.num_attention_heads == preset.hidden_size


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_the_round_trip_through_json(name):
    again = ModelConfig.from_hf(as_json(PRESETS[name].to_hf()))
    assert again == PRESETS[name]
    assert hash(again) == hash(PRESETS[name])


PARAMETERS = {
    "qwen2-0.5b": (494_032_768, 494_032_768), "qwen2-1.5b": (1_543_714_304, 1_543_714_304),
    "qwen2.5-3b": (3_085_938_688, 3_085_938_688), "qwen2-7b": (7_615_616_512, 7_615_616_512),
    "qwen2.5-14b": (14_770_033_664, 14_770_033_664), "qwen2.5-32b": (32_763_876_352, 32_763_876_352),
    "qwen2-72b": (72_706_203_648, 72_706_203_648), "qwen2-57b-a14b": (57_408_658_944, 14_249_270_784),
    "qwen1.5-moe-a2.7b": (14_315_784_192, 2_689_173_504),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts(name):
    assert (flops.parameters(PRESETS[name]), flops.active_parameters(PRESETS[name])) == PARAMETERS[name]


def test_cache_bytes_per_token():
    names = ("qwen2-0.5b", "qwen2-1.5b", "qwen2-7b", "qwen2-72b", "qwen2-57b-a14b")
    assert [flops.kv_bytes_per_token(PRESETS[name], 2) // 1024 for name in names] == [12, 28, 56, 320, 56]


def test_forward_flops():
    model = config(tie_word_embeddings=True)
    norms, biases = 32 * (2 * 4 + 1), 4 * (4 + 2 * 2) * 8
    weights = flops.parameters(model) - norms - biases
    pairs = 10 * 11 // 2
    assert flops.forward_flops(model, 10) == 2 * 10 * weights + 4 * pairs * 4 * 8 * 4
    window = config(use_sliding_window=True, sliding_window=3, max_window_layers=3)
    want = flops.forward_flops(config(), 10) - 4 * (pairs - (1 + 2 + 3 * 8)) * 4 * 8
    assert flops.forward_flops(window, 10) == want


# Reading and writing


def test_every_field_is_read_and_written():
    """A field that from_hf or to_hf forgets does not survive its own mutation."""
    names = {field.name for field in dataclasses.fields(ModelConfig)}
    assert names == set(MUTATIONS) | ONE_VALUE
    base = sparse()
    for name, changes in MUTATIONS.items():
        if name == "model_type":
            changed = config()
        else:
            changed = dataclasses.replace(base, **changes)
        assert getattr(changed, name) != getattr(base, name), name
        written = as_json(changed.to_hf())
        assert written != base.to_hf(), name
        assert ModelConfig.from_hf(written) == changed, name


@pytest.mark.parametrize(
    ("name", "value"),
    [("attention_factor", 1.5), ("mscale", 0.7), ("mscale_all_dim", 0.8), ("beta_fast", 16.0), ("beta_slow", 2.0),
     ("truncate", False), ("factor", 2.0), ("original_max_position_embeddings", 99)],
)  # fmt: skip
def test_every_yarn_field_is_read_and_written(name, value):
    base = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=64)
    changed = config(rope_scaling=dataclasses.replace(base, **{name: value}))
    assert changed.rope_scaling != base
    assert changed.to_hf()["rope_scaling"][name] == value
    assert ModelConfig.from_hf(as_json(changed.to_hf())) == changed


def test_spellings_of_rope_agree():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64}
    files = [
        {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", **yarn}},
        {"rope_theta": 1000000, "rope_scaling": {"rope_type": "yarn", **yarn, "factor": 4}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, **yarn}},
        {"rope_parameters": {"type": "yarn", "rope_type": "yarn", "rope_theta": 1e6, **yarn}},
        {"rope_theta": 1e6, "rope_parameters": {"rope_type": "yarn", **yarn, "attention_factor": None}},
    ]
    read = [ModelConfig.from_hf(DENSE_FILE | file) for file in files]
    assert set(read) == {config(rope_theta=1e6, rope_scaling=RopeScaling(type="yarn", **yarn))}
    plain = [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}]
    assert {ModelConfig.from_hf(DENSE_FILE | file) for file in plain} == {config(rope_theta=10000.0)}
    linear = ModelConfig.from_hf(DENSE_FILE | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.rope_scaling == RopeScaling(type="linear", factor=2.0)
    assert ModelConfig.from_hf(linear.to_hf()) == linear


def test_yarn_without_an_original_length_takes_max_position_embeddings():
    given = {"max_position_embeddings": 512, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert ModelConfig.from_hf(DENSE_FILE | given).rope_scaling.original_max_position_embeddings == 512


def test_dtype_spellings_and_null_lists():
    assert ModelConfig.from_hf(DENSE_FILE | {"dtype": "float16"}).dtype == "float16"
    assert ModelConfig.from_hf(DENSE_FILE | {"torch_dtype": "bfloat16"}).dtype == "bfloat16"
    assert ModelConfig.from_hf(DENSE_FILE).dtype == "float32"
    assert ModelConfig.from_hf(SPARSE_FILE | {"mlp_only_layers": None, "layer_types": None}) == sparse()
    assert ModelConfig.from_hf(DENSE_FILE | {"num_key_value_heads": None}).num_key_value_heads == 4
    assert ModelConfig.from_hf(DENSE_FILE | {"eos_token_id": [3, 4]}).eos_ids == (3, 4)
    assert (config(eos_token_id=5).eos_ids, config().eos_ids) == ((5,), ())


def test_dual_chunk_defaults_and_sparse_settings():
    assert DualChunk() == DualChunk(chunk_size=8192, local_size=1024, original_max_position_embeddings=0)
    with pytest.warns(UserWarning, match="sparse_attention"):
        read = ModelConfig.from_hf(DENSE_FILE | {"dual_chunk_attention_config": {"sparse_attention_enabled": True}})
    assert read.dual_chunk_attention_config == DualChunk()


@pytest.mark.parametrize("name", ["qwen2-0.5b-instruct", "qwen2-57b-a14b", "qwen2.5-14b-instruct-1m"])
@pytest.mark.parametrize("changes", [
    {},
    {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 5},
    {"rope_scaling": RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=32768)},
    {"rope_scaling": RopeScaling(type="linear", factor=4.0)},
], ids=["plain", "window", "yarn", "linear"])  # fmt: skip
def test_transformers_reads_ours_and_we_read_what_it_writes(name, changes):
    import transformers

    ours = dataclasses.replace(PRESETS[name], **changes)
    kind = transformers.Qwen2Config if ours.model_type == "qwen2" else transformers.Qwen2MoeConfig
    theirs = kind.from_dict(as_json(ours.to_hf()))
    for field in dataclasses.fields(ours):
        got = getattr(theirs, field.name, None)
        if field.name in ("rope_theta", "rope_scaling", "dual_chunk_attention_config", "layer_types", "sliding_window"):
            continue
        if (field.name == "head_dim" and got is None) or (ours.num_experts == 0 and not hasattr(theirs, field.name)):
            continue
        want = getattr(ours, field.name)
        assert str(got).removeprefix("torch.") == want if field.name == "dtype" else got == want or tuple(got) == want
    rope = theirs.rope_parameters
    assert rope["rope_theta"] == ours.rope_theta
    assert rope["rope_type"] == (ours.rope_scaling.type if ours.rope_scaling else "default")
    window = [theirs.sliding_window if t == "sliding_attention" else FULL for t in theirs.layer_types]
    assert tuple(window) == ours.windows

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing that transformers writes is unknown here
        for written in (theirs.to_dict(), theirs.to_diff_dict(), json.loads(theirs.to_json_string())):
            back = ModelConfig.from_hf(as_json(written))
            kept = dataclasses.replace(ours, sliding_window=back.sliding_window)  # dropped by them when switched off
            assert back == (ours if ours.use_sliding_window else kept)


# What is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'", "'qwen2'", "'qwen2_moe'"]),
        ({"model_type": None}, ["model_type", "None"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "'gelu'", "'silu'"]),
        ({"quantization_config": {"bits": 4}}, ["quantization_config", "bits"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5", "1.0"]),
        ({"dtype": "float8_e4m3fn"}, ["dtype", "float8_e4m3fn", "'bfloat16'"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_scaling", "'dynamic'", "'yarn'"]),
        ({"rope_scaling": {"rope_type": "longrope"}}, ["'longrope'"]),
        ({"rope_parameters": {"rope_type": "llama3"}}, ["rope_parameters", "'llama3'"]),
        ({"rope_scaling": {"type": "yarn"}}, ["rope_scaling", "factor"]),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "attn_factor": 1.0}}, ["attn_factor", "attention_factor"]),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2.0}}, ["'linear'", "'yarn'"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "factor", "'default'"]),
        ({"rope_scaling": "yarn"}, ["rope_scaling", "object"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["rope_parameters", "full_attention"]),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, ["factor", "0.5", "1"]),
        ({"rope_theta": None}, ["rope_theta", "None"]),
        ({"original_max_position_embeddings": 64}, ["original_max_position_embeddings", "64"]),
        ({"dual_chunk_attention_config": {"chunk": 4}}, ["dual_chunk_attention_config", "chunk", "chunk_size"]),
        ({"dual_chunk_attention_config": {"chunk_size": 4, "local_size": 4}}, ["local_size", "4"]),
        ({"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8}, ["num_key_value_heads", "6", "4"]),
        ({"num_attention_heads": 5, "num_key_value_heads": 5}, ["hidden_size", "32", "5"]),
        ({"head_dim": 7}, ["head_dim", "7"]),
        ({"hidden_size": "32"}, ["hidden_size", "'32'", "int"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings", "bool"]),
        ({"rms_norm_eps": float("nan")}, ["rms_norm_eps", "nan"]),
        ({"eos_token_id": "2"}, ["eos_token_id", "'2'"]),
        ({"num_experts": 4}, ["num_experts", "qwen2_moe"]),
        ({"qkv_bias": False}, ["qkv_bias", "qwen2_moe"]),
        ({"layer_types": ["full_attention"]}, ["layer_types", "1", "4"]),
        ({"layer_types": ["chunked_attention"] * 4}, ["layer_types", "chunked_attention", "sliding_attention"]),
        ({"layer_types": ["sliding_attention"] * 4}, ["layer_types", "use_sliding_window"]),
        ({"use_sliding_window": True, "sliding_window": None}, ["sliding_window", "None"]),
    ],
)
def test_unsupported_settings_are_refused_by_name(changes, words):
    with pytest.raises(UserError) as error:
        ModelConfig.from_hf(DENSE_FILE | changes)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("name", [*TINY, *EXPERTS])
def test_missing_sizes_are_named(name):
    file = {key: value for key, value in SPARSE_FILE.items() if key != name}
    with pytest.raises(UserError, match=f"has no {name};"):
        ModelConfig.from_hf(file)


def test_sparse_models_are_checked():
    with pytest.raises(UserError, match="num_experts_per_tok is 9"):
        sparse(num_experts_per_tok=9)
    with pytest.raises(UserError, match=r"mlp_only_layers has 4; allowed are 0 to 3"):
        sparse(mlp_only_layers=(4,))
    with pytest.raises(UserError, match="moe_intermediate_size is 0"):
        sparse(moe_intermediate_size=0)


def test_unknown_keys_warn_and_harmless_ones_do_not():
    with pytest.warns(UserWarning, match="flux_capacitor = 3"):
        ModelConfig.from_hf(DENSE_FILE | {"flux_capacitor": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = {
            "architectures": ["Qwen2ForCausalLM"],
            "use_cache": True,
            "temperature": 0.7,
            "quantization_config": None,
        }
        assert ModelConfig.from_hf(DENSE_FILE | quiet) == config()


# What is derived


def test_windows_follow_each_family():
    dense = config(use_sliding_window=True, sliding_window=9, max_window_layers=3)
    assert dense.windows == (FULL, FULL, FULL, 9)
    moe = sparse(use_sliding_window=True, sliding_window=9, max_window_layers=3)
    assert moe.windows == (9, FULL, 9, FULL)
    assert config(sliding_window=9, max_window_layers=0).windows == (FULL,) * 4


def test_layer_types_win_over_the_rule():
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    given = DENSE_FILE | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3, "layer_types": types}
    read = ModelConfig.from_hf(given)
    assert read.windows == (9, FULL, FULL, 9)
    assert read.to_hf()["layer_types"] == types
    same = ModelConfig.from_hf(given | {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]})
    assert same.layer_types is None


def test_trained_length():
    assert PRESETS["qwen2-7b"].trained_length == 32768
    assert PRESETS["qwen1.5-moe-a2.7b"].trained_length == 8192
    assert PRESETS["qwen2.5-7b-instruct-1m"].trained_length == 262144
    yarn = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=100)
    assert config(rope_scaling=yarn).trained_length == 100
    assert config(dual_chunk_attention_config=DualChunk(), max_position_embeddings=64).trained_length == 64


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, [LayerScan(("sparse",), 0, 4)]),
        ({"num_experts": 0}, [LayerScan(("dense",), 0, 4)]),
        ({"decoder_sparse_step": 2}, [LayerScan(("dense", "sparse"), 0, 2)]),
        (
            {"decoder_sparse_step": 2, "num_hidden_layers": 5},
            [LayerScan(("dense",), 0, 1), LayerScan(("sparse", "dense"), 1, 2)],
        ),
        ({"mlp_only_layers": (0,)}, [LayerScan(("dense",), 0, 1), LayerScan(("sparse",), 1, 3)]),
        ({"mlp_only_layers": (0, 1, 2, 3)}, [LayerScan(("dense",), 0, 4)]),
        ({"decoder_sparse_step": 3, "num_hidden_layers": 9}, [LayerScan(("dense", "dense", "sparse"), 0, 3)]),
    ],
)
def test_stacks(changes, want):
    assert sparse(**changes).stacks() == tuple(want)


@given(st.lists(st.booleans(), min_size=1, max_size=24), st.booleans())
@MANY
def test_stacks_cover_every_layer_once_with_its_kind(pattern, unroll):
    only = tuple(i for i, is_sparse in enumerate(pattern) if not is_sparse)
    model = sparse(num_hidden_layers=len(pattern), mlp_only_layers=only)
    layers = {}
    for kinds, first, repeats in model.stacks(unroll):
        assert not unroll or (repeats, len(kinds)) == (1, 1)
        for r in range(repeats):
            for j, kind in enumerate(kinds):
                layers[first + r * len(kinds) + j] = kind
    assert layers == {i: "sparse" if model.is_sparse(i) else "dense" for i in range(len(pattern))}
    assert sum(len(s.kinds) * s.repeats for s in model.stacks(unroll)) == len(pattern)
