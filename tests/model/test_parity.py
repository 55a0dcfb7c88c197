# SPDX-License-Identifier: Apache-2.0
"""Equality with transformers: recordings of tiny random models of every variant, see golden/make.py.

The bar is 1e-4 on every logit in float32 and the same greedy tokens. Where float32 itself is not that exact (scores
of a thousand) and in bfloat16, the rule is a ratio: at most twice the error of transformers in the same arithmetic.
"""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import qwen2_jax
from few import slow
from qwen2_jax import checkpoint
from qwen2_jax.config import ModelConfig, RopeScaling
from qwen2_jax.model import Qwen2, declare, mlp, rope, yarn
from qwen2_jax.model.cross_entropy import token_logprobs
from qwen2_jax.weights.params import count

GOLDEN = Path(__file__).parents[1] / "golden"
DATA = Path(__file__).parents[3] / "shared" / "data"
DENSE = [
    "bf16", "dense_tied", "dense_untied", "head_dim", "heads_14_2", "heads_28_4", "large_logits", "mha", "mqa",
    "rope_linear", "sliding", "yarn", "yarn_attention_factor", "yarn_mscale",
]  # fmt: skip
SPARSE = ["moe", "moe_mlp_only", "moe_no_bias", "moe_norm_topk", "moe_sliding", "moe_step_2", "moe_yarn"]
YARN = [name for name in DENSE + SPARSE if "yarn" in name]
ATOL = 1e-4  # 1.2e-5 to 4.4e-5 was seen, for logits of up to 14; one wrong number moves them by ten times as much
ROUNDED = 2.0**-23  # relative: float64 rounded once to float32, 5.4e-8 was seen
NEW = 24  # recorded new tokens of each prompt
# Slow: what two other variants have, one each; two numbers of heads more; what greedy tokens show below (mlp_only), and
# the float32 model whose bfloat16 is below.
ELSEWHERE = ["bf16", "heads_14_2", "heads_28_4", "mha", "yarn_attention_factor"]
ELSEWHERE += ["moe_mlp_only", "moe_sliding", "moe_yarn"]
every_variant = pytest.mark.parametrize("variant", [v if v not in ELSEWHERE else slow(v)[0] for v in DENSE + SPARSE])
every_sparse_variant = pytest.mark.parametrize("variant", [v if v not in ELSEWHERE else slow(v)[0] for v in SPARSE])


@functools.cache
def golden(variant: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / variant / "golden.npz") as arrays:
        return dict(arrays)


@functools.cache
def config_of(variant: str) -> ModelConfig:
    return checkpoint.read_config(checkpoint.locate(str(GOLDEN / variant)))


@functools.cache
def params_of(variant: str, unroll: bool = False, dtype: str = "float32"):
    return checkpoint.load_params(
        checkpoint.locate(str(GOLDEN / variant)), config_of(variant), dtype=jnp.dtype(dtype), unroll=unroll
    )


@functools.cache
def lm_of(variant: str):
    return qwen2_jax.load(str(GOLDEN / variant), dtype="float32")


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens_BT, rotary, positions_BT=None):
    """(logits, hidden, router statistics)."""
    model = nnx.merge(graphdef, params)
    out = model(tokens_BT, rope=rotary, positions_BT=positions_BT)
    return model.logits(out.hidden_BTD), out.hidden_BTD, out.router


def run(
    variant: str, tokens_BT=None, *, mode="auto", config=None, params=None, unroll=False, dtype="float32", **kwargs
):
    config = config_of(variant) if config is None else config
    tokens_BT = golden(variant)["tokens"] if tokens_BT is None else tokens_BT
    params = params_of(variant, unroll, dtype) if params is None else params
    graphdef, _ = declare(config, dtype=jnp.dtype(dtype), unroll=unroll)
    return forward(graphdef, params, jnp.asarray(tokens_BT), rope.choose(config, tokens_BT.shape[1], mode), **kwargs)


def error(got, want) -> float:
    return float(np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64)).max())


def assert_logits_equal(variant: str, logits):
    want = golden(variant)
    assert logits.shape == want["logits"].shape
    assert np.isfinite(logits).all()
    if "logits_float64" in want:
        exact = want["logits_float64"]
        assert error(logits, exact) <= 2 * error(want["logits"], exact) + ATOL
    else:
        assert error(logits, want["logits"]) <= ATOL


def logprob_tolerance(variant: str) -> float:
    """A log-probability is a logit less a log-sum-exp, so its error may be that of two logits."""
    g = golden(variant)
    return 2 * ATOL if "logits_float64" not in g else 4 * error(g["logits"], g["logits_float64"]) + 2 * ATOL


def prompts_of(variant: str) -> list[list[int]]:
    g = golden(variant)
    return [row[:n].tolist() for row, n in zip(g["prompts"], g["prompt_lengths"], strict=True)]


def perturbed(params, path: tuple, amount: float):
    """A copy of nested dicts with the first number of one array changed."""
    if not path:
        return params.at[(0,) * params.ndim].add(amount)
    return params | {path[0]: perturbed(params[path[0]], path[1:], amount)}


def test_every_recording_is_tested():
    words = [path.parent.name for path in GOLDEN.glob("*/golden.npz") if not path.parent.name.startswith("score_")]
    assert sorted(words) == sorted(DENSE + SPARSE)  # those of scores: test_reward.py


# The decoder


@every_variant
def test_logits(variant):
    """Layers stacked and scanned. Unrolled ones are what qwen2_jax.load makes on a CPU, below."""
    logits, hidden, _ = run(variant)
    assert logits.dtype == hidden.dtype == jnp.float32
    assert_logits_equal(variant, logits)


@pytest.mark.parametrize("unroll", [*slow(False), True], ids=["stacked", "unrolled"])
@pytest.mark.parametrize("variant", ["dense_untied", *slow("moe_mlp_only")])
def test_logits_with_all_optimizations(variant, unroll, all_optimizations):
    graphdef, _ = declare(config_of(variant), unroll=unroll)
    tokens = jnp.asarray(golden(variant)["tokens"])
    rotary = rope.choose(config_of(variant), tokens.shape[1])
    optimized = jax.jit(lambda params: forward.__wrapped__(graphdef, params, tokens, rotary)[0])
    assert_logits_equal(variant, optimized(params_of(variant, unroll)))


@pytest.mark.parametrize("variant", ["dense_tied", "moe_step_2"])
def test_training_loss(variant):
    tokens = jnp.asarray(golden(variant)["tokens"])
    _, hidden, router = run(variant)
    graphdef, _ = declare(config_of(variant))
    head_VD = nnx.merge(graphdef, params_of(variant)).head_weight()
    loss = -token_logprobs(hidden[:, :-1], head_VD, tokens[:, 1:], chunk=16).mean()
    np.testing.assert_allclose(loss, golden(variant)["loss"], rtol=1e-6)  # 1.2e-7 was seen
    if router is not None:
        total = loss + config_of(variant).router_aux_loss_coef * mlp.load_balancing_loss(router)
        np.testing.assert_allclose(total, golden(variant)["loss_with_aux"], rtol=1e-6)  # 1.2e-7


def test_bfloat16_errs_no_more_than_transformers():
    g = golden("bf16")
    logits, hidden, _ = run("bf16", dtype="bfloat16")
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    assert error(logits, g["logits"]) <= 2 * error(g["logits_bf16"], g["logits"])
    squared = [np.square(np.asarray(x) - g["logits"]).mean() for x in (logits, g["logits_bf16"])]
    assert squared[0] <= 1.5**2 * squared[1]


LAYER_0 = ("stacks", 0, "blocks", 0)


@pytest.mark.parametrize(
    ("variant", "path"),
    [
        ("dense_untied", ("head_VD",)),
        ("dense_untied", ("final_norm_D",)),
        ("dense_untied", (*LAYER_0, "attention", "bk_KH")),
        ("dense_untied", (*LAYER_0, "attention", "wo_DNH")),
        ("dense_untied", (*LAYER_0, "mlp", "down_DF")),
        ("moe", (*LAYER_0, "moe", "router_ED")),
        ("moe", (*LAYER_0, "moe", "shared_gate_D")),
        ("moe", (*LAYER_0, "moe", "down_EDF")),
    ],
    ids=lambda x: x if isinstance(x, str) else x[-1],
)
def test_one_wrong_number_is_noticed(variant, path):
    logits, _, _ = run(variant, params=perturbed(params_of(variant), path, 0.05))
    assert error(logits, golden(variant)["logits"]) > 10 * ATOL


@pytest.mark.parametrize(
    ("variant", "change"),
    [
        ("sliding", {"sliding_window": 8}),
        *slow(
            ("moe_norm_topk", {"norm_topk_prob": False}),
            ("dense_untied", {"rms_norm_eps": 1e-3}),
            ("sliding", {"max_window_layers": 3}),
            ("moe_sliding", {"max_window_layers": 2}),
            ("dense_untied", {"rope_theta": 500000.0}),
            ("rope_linear", {"rope_scaling": None}),
            ("moe", {"num_experts_per_tok": 3}),
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else next(iter(x)),
)
def test_one_wrong_setting_is_noticed(variant, change):
    logits, _, _ = run(variant, config=dataclasses.replace(config_of(variant), **change))
    assert error(logits, golden(variant)["logits"]) > 10 * ATOL


# Long contexts


@pytest.mark.parametrize("variant", ["yarn", *slow(*[v for v in YARN if v != "yarn"])])
def test_yarn_is_used_beyond_the_trained_length_only(variant):
    g, config = golden(variant), config_of(variant)
    short = g["tokens"][:, : config.trained_length]
    assert short.shape[1] < g["tokens"].shape[1]
    as_transformers, _, _ = run(variant, short, mode="yarn")  # which stretches every prompt
    assert error(as_transformers, g["logits"][:, : short.shape[1]]) <= ATOL
    untouched, _, _ = run(variant, short)
    plain, _, _ = run(variant, short, config=dataclasses.replace(config, rope_scaling=None))
    np.testing.assert_array_equal(untouched, plain)
    assert error(untouched, as_transformers) > 10 * ATOL
    off, _, _ = run(variant, mode="off")
    assert error(off, g["logits"]) > 10 * ATOL


def yarn_vectors():
    path = DATA / "yarn_vectors.json"
    if not path.exists():
        pytest.skip(f"{path.name} is not beside this checkout")
    for key, want in json.loads(path.read_text()).items():
        head_dim, theta, factor, original = map(float, key.split(","))
        yield int(head_dim), theta, factor, int(original), np.asarray(want["inv_freq"]), want["attention_factor"]


def test_yarn_frequencies():
    for head_dim, theta, factor, original, inv_freq, attention_factor in yarn_vectors():
        got = yarn.frequencies(head_dim, theta=theta, factor=factor, original_length=original)
        np.testing.assert_allclose(got, inv_freq, rtol=ROUNDED)
        scaling = RopeScaling(type="yarn", factor=factor, original_max_position_embeddings=original)
        config = ModelConfig(
            vocab_size=8, hidden_size=head_dim, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            rope_theta=theta, rope_scaling=scaling,
        )  # fmt: skip
        long, short = (rope.choose(config, original + more) for more in (1, 0))
        np.testing.assert_allclose(long.inv_freq_Bf[0], inv_freq, rtol=ROUNDED)
        np.testing.assert_allclose(long.amplitude_B, attention_factor**2, rtol=ROUNDED)
        plain = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        np.testing.assert_allclose(short.inv_freq_Bf[0], plain, rtol=ROUNDED)
        np.testing.assert_array_equal(short.amplitude_B, 1)


def test_yarn_frequencies_of_qwen2_7b():
    got = yarn.frequencies(128, theta=1e6, factor=4.0, original_length=32768)
    plain = 1e6 ** (-np.arange(64) / 64)
    ratio = np.interp(np.arange(64), [23, 40], [1.0, 0.25])  # 23 and 40: where 32 and 1 turns fall, rounded outwards
    np.testing.assert_allclose(got, plain * ratio, rtol=ROUNDED)


# Mixture of experts


@every_sparse_variant
def test_load_balancing_loss(variant):
    """Ours is the definition's. Softmax applied twice, which some releases of transformers had, is far from it."""
    g = golden(variant)
    _, _, router = run(variant)
    loss = float(mlp.load_balancing_loss(router))
    np.testing.assert_allclose(loss, g["aux_float32"], rtol=1e-6)  # 9.3e-8 was seen
    np.testing.assert_allclose(loss, g["aux_transformers"], rtol=1e-6)  # 1.1e-7
    assert abs(loss - g["aux_double_softmax"]) > 1e-2
    sparse_layers = sum(map(config_of(variant).is_sparse, range(config_of(variant).num_hidden_layers)))
    assert router.tokens == g["tokens"].size * sparse_layers


@pytest.mark.parametrize("variant", slow("moe", "moe_step_2"))  # quick: the statistics, test_mlp.py
def test_load_balancing_loss_leaves_padding_out(variant):
    g = golden(variant)
    positions = np.arange(g["tokens"].shape[1]) * np.ones_like(g["tokens"])
    positions[1] = -1
    logits, _, router = run(variant, positions_BT=jnp.asarray(positions))
    np.testing.assert_allclose(mlp.load_balancing_loss(router), g["aux_row_0"], rtol=1e-6)  # as above
    assert error(logits[0], g["logits"][0]) <= ATOL


@pytest.mark.parametrize("variant", slow("moe_no_bias", "moe_norm_topk"))  # quick: test_mlp.py, test_golden_training.py
def test_gradients_reach_the_router(variant):
    """Of each loss: the slope along its gradient, against a difference over which no token changes its experts."""
    tokens = jnp.asarray(golden(variant)["tokens"][1:, :16])
    params, (graphdef, _) = params_of(variant), declare(config_of(variant))
    rotary = rope.choose(config_of(variant), 16)
    router_ED = params["stacks"][0]["blocks"][0]["moe"]["router_ED"]

    def losses(router_ED):
        """[cross-entropy, load balancing, z], and how often each expert was chosen."""
        block = params["stacks"][0]["blocks"][0]
        block = block | {"moe": block["moe"] | {"router_ED": router_ED}}
        model = nnx.merge(graphdef, params | {"stacks": {0: {"blocks": {0: block}}}})
        out = model(tokens, rope=rotary)
        logprobs = token_logprobs(out.hidden_BTD[:, :-1], model.head_weight(), tokens[:, 1:])
        values = -logprobs.mean(), mlp.load_balancing_loss(out.router), mlp.router_z_loss(out.router)
        return jnp.stack(values), out.router.counts_E

    gradients, _ = jax.jit(jax.jacrev(losses, has_aux=True))(router_ED)
    _, counts = (run_losses := jax.jit(losses))(router_ED)
    for i, gradient in enumerate(gradients):
        slope = jnp.linalg.norm(gradient)
        assert slope > 1e-3
        step = 2e-3 * gradient / slope
        (above, counts_above), (below, counts_below) = run_losses(router_ED + step), run_losses(router_ED - step)
        np.testing.assert_array_equal(counts_above, counts)
        np.testing.assert_array_equal(counts_below, counts)
        # A difference over 4e-3 of float32 losses, and the curvature between.
        np.testing.assert_allclose((above[i] - below[i]) / 4e-3, slope, rtol=2e-2)


# The public interface


LOADED = ["dense_tied"]  # the rest slowly: their layers are those of test_logits, unrolled as in test_greedy_tokens


@pytest.mark.parametrize("variant", [*LOADED, *slow(*[v for v in DENSE + SPARSE if v not in LOADED])])
def test_load_gives_the_same_logits(variant):
    g, lm = golden(variant), lm_of(variant)
    assert lm.config == config_of(variant)
    assert lm.tokenizer is None
    logits = lm.logits(g["tokens"])
    assert isinstance(logits, np.ndarray)
    assert logits.dtype == np.float32
    assert_logits_equal(variant, logits)


@pytest.mark.parametrize("variant", ["yarn", *slow("dense_untied", "large_logits", "sliding", "moe_mlp_only")])
def test_load_gives_the_same_logprobs(variant):
    """In two chunks, over a cache. Those of generated tokens are compared for every variant below."""
    g, lm = golden(variant), lm_of(variant)
    logprobs = lm.logprobs(g["tokens"])
    assert isinstance(logprobs, np.ndarray)
    assert logprobs.dtype == np.float32
    exact = g.get("logits_float64", g["logits"])
    normalised = jax.nn.log_softmax(jnp.asarray(exact[:, :-1], jnp.float32), axis=-1)
    want = np.take_along_axis(np.asarray(normalised), g["tokens"][:, 1:, None], axis=-1)[..., 0]
    assert logprobs.shape == want.shape
    assert error(logprobs, want) <= logprob_tolerance(variant)


def assert_answers_equal(variant: str, answers):
    g = golden(variant)
    assert [list(a.token_ids) for a in answers] == g["generated"].tolist()
    assert {a.finish_reason for a in answers} == {"length"}
    assert error([a.logprobs for a in answers], g["generated_logprobs"]) <= logprob_tolerance(variant)


ANSWERED = ["moe_mlp_only"]  # the rest slowly; quick: dense below, windows in test_decoder.py, yarn's cache above


@pytest.mark.parametrize("variant", [*ANSWERED, *slow(*[v for v in DENSE + SPARSE if v not in ANSWERED])])
def test_greedy_tokens(variant):
    """Prompts of several lengths at once; transformers pads them on the left."""
    answers = lm_of(variant).generate(prompts_of(variant), max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
    assert_answers_equal(variant, answers)


@pytest.mark.parametrize("variant", slow("dense_tied", "sliding", "yarn", "moe_step_2"))  # quick: test_generate.py
def test_greedy_tokens_of_each_prompt_alone(variant):
    alone = [
        lm_of(variant).generate([prompt], max_new_tokens=NEW, temperature=0.0, ignore_eos=True)
        for prompt in prompts_of(variant)
    ]
    assert_answers_equal(variant, [answer for (answer,) in alone])


@pytest.mark.parametrize("variant", ["dense_tied", *slow("moe", "sliding")])
def test_greedy_tokens_with_repetition_penalty(variant):
    g = golden(variant)
    answers = lm_of(variant).generate(
        prompts_of(variant),
        max_new_tokens=NEW,
        temperature=0.0,
        repetition_penalty=1.1,
        ignore_eos=True,
    )
    assert [list(a.token_ids) for a in answers] == g["penalized"].tolist()
    assert (g["penalized"] != g["generated"]).any()


def test_generation_config_decides_where_a_row_ends(tmp_path):
    """eos as a list, and a repetition penalty, from generation_config.json."""
    g, prompts = golden("dense_tied"), prompts_of("dense_tied")
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "dense_tied", folder)
    rows = g["penalized"].tolist()
    ends = [rows[0][5], rows[1][8]]
    settings = {"do_sample": False, "eos_token_id": ends, "repetition_penalty": 1.1}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    lm = qwen2_jax.load(str(folder), dtype="float32")
    for row, answer in zip(rows, lm.generate(prompts, max_new_tokens=len(rows[0])), strict=True):
        stop = next((i for i, token in enumerate(row) if token in ends), None)
        assert answer.finish_reason == ("length" if stop is None else "stop")
        kept = [token for token in answer.token_ids if token not in ends]  # the end token itself may be kept or not
        assert kept == row[:stop]


# Every preset at its full size, without memory

PARAMETERS = {
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2-72b": 72_706_203_648,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen1.5-moe-a2.7b": 14_315_784_192,
}


def test_parameter_counts_of_all_presets():
    counts = {}
    for name, config in qwen2_jax.PRESETS.items():
        size = name.replace("-instruct", "").replace("-chat", "").replace("-1m", "")
        same = size if size in PARAMETERS else size.replace("qwen2.5", "qwen2")
        shape = dataclasses.replace(config, rms_norm_eps=1e-6, max_position_embeddings=32768, eos_token_id=None)
        if shape not in counts:
            counts[shape] = count(declare(config)[1])
        assert counts[shape] == PARAMETERS[same], name
    assert {name for name in PARAMETERS if name in qwen2_jax.PRESETS} == set(PARAMETERS)


@pytest.mark.parametrize("unroll", [False, True])
def test_parameter_count_of_the_module(unroll):
    model = nnx.eval_shape(lambda: Qwen2(qwen2_jax.PRESETS["qwen2-0.5b"], rngs=nnx.Rngs(0), unroll=unroll))
    sizes = [math.prod(p.shape) for p in jax.tree.leaves(nnx.state(model, nnx.Param))]
    assert sum(sizes) == PARAMETERS["qwen2-0.5b"]
