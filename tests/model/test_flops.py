# SPDX-License-Identifier: Apache-2.0
"""Operations of a training step: by hand, against XLA's own count, and however the documents are packed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from few import MANY
from qwen2_jax import PRESETS, model
from qwen2_jax.model import flops
from tiny import CONFIGS


def test_qwen2_7b_at_4096_by_hand():
    """28 layers, width 3584, 28 heads of 128, 4 kv heads, feed-forward 18944, vocabulary 152064, head of its own."""
    layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944  # q, k and v; o; gate, up and down
    matrices = 28 * layer + 152064 * 3584
    pairs = 4096 * 4097 // 2
    want = 6 * 4096 * matrices + 12 * 28 * 28 * 128 * pairs
    assert flops.train_flops(PRESETS["qwen2-7b"], [4096]) == want == 183_863_573_741_568


def test_only_chosen_experts_count():
    """57B-A14B: 8 of 64 experts of width 2560, a shared one of width 20480 with a gate, and the router."""
    config = PRESETS["qwen2-57b-a14b"]
    attention = 3584 * (2 * 3584 + 2 * 4 * 128)
    experts = 3 * 3584 * (8 * 2560 + 20480) + 64 * 3584 + 3584
    matrices = 28 * (attention + experts) + 151936 * 3584
    assert flops.train_flops(config, [1]) == 6 * matrices + 12 * 28 * 28 * 128


def test_the_head_counts_once_tied_or_not():
    tied, untied = (flops.train_flops(CONFIGS[name], [50]) for name in ("dense", "untied"))
    assert tied == untied


def test_frozen_matrices_need_no_gradient():
    """Adapters: forward and the gradient of the activations, which for attention is all there is."""
    config = CONFIGS["dense"]
    one, two = flops.train_flops(config, [1]), flops.train_flops(config, [1], frozen=True)
    attention = 12 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    assert 3 * (two - attention) == 2 * (one - attention)


@pytest.mark.parametrize("name", ["dense", "sliding", "moe_mixed"])
def test_three_forward_passes(name):
    lengths = [1, 5, 40]
    assert flops.train_flops(CONFIGS[name], lengths) == 3 * sum(flops.forward_flops(CONFIGS[name], n) for n in lengths)


def test_a_window_is_a_band():
    config = CONFIGS["sliding"]  # 4 layers, 3 of them see 7 keys
    seen = sum(min(i + 1, 7) for i in range(40))
    longer = flops.train_flops(config, [40]) - flops.train_flops(config, [1] * 40)
    assert longer == 12 * 6 * 8 * (3 * (seen - 40) + (40 * 41 // 2 - 40))


documents = st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=5)


@MANY
@given(documents, st.integers(0, 3), st.booleans())
def test_segment_lengths(rows, padding, micro):
    """Ids of neighbours differ, within a row and across rows; batches of micro-batches are rows as well."""
    T = max(sum(row) for row in rows) + padding
    segments = np.full((len(rows), max(T, 1)), -1, np.int32)
    for segment, row in zip(segments, rows, strict=True):
        segment[: sum(row)] = np.repeat(np.arange(len(row)), row)
    found = flops.segment_lengths(segments[None] if micro else segments)
    assert found.tolist() == sum(rows, [])  # noqa: RUF017


def xla_flops(config, T: int, *, train: bool) -> float:
    """XLA's count for one row of T tokens, layers unrolled: it counts the body of a loop once."""
    graphdef, specs = model.declare(config, unroll=True)

    def loss(params, tokens_BT):
        qwen2 = nnx.merge(graphdef, params)
        logits = qwen2.logits(qwen2(tokens_BT, implementation="reference").hidden_BTD)
        return jnp.sum(jax.nn.logsumexp(logits, axis=-1))

    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=lambda x: hasattr(x, "hf"))
    function = jax.grad(loss) if train else loss
    return jax.jit(function).lower(shapes, jax.ShapeDtypeStruct((1, T), jnp.int32)).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("train", [False, True], ids=["forward", "step"])
def test_xla_counts_the_same(train):
    """The reference computes attention's whole square, so that is what is compared; the rest is norms and softmax."""
    config = dataclasses.replace(
        CONFIGS["untied"], hidden_size=256, head_dim=64, num_attention_heads=4, intermediate_size=768,
        num_hidden_layers=1, vocab_size=1024,
    )  # fmt: skip
    T = 128
    one = flops.train_flops if train else lambda config, lengths: flops.forward_flops(config, *lengths)
    square = (12 if train else 4) * 4 * 64 * (T * T - T * (T + 1) // 2)
    assert xla_flops(config, T, train=train) == pytest.approx(one(config, [T]) + square, rel=0.03)
