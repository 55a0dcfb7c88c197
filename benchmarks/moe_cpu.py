# SPDX-License-Identifier: Apache-2.0
"""Cost of one mixture-of-experts layer on CPU against its number of experts, with the active experts held fixed.

    python benchmarks/moe_cpu.py [--record]

Every row has the same top-k, token count and expert width, so the arithmetic that the answer needs is the same: a
layer whose cost follows the active experts stays flat, one that computes every expert for every token grows with E.
Ours (sort by expert, grouped matmul) stands beside the same layer on jax.lax.ragged_dot, which XLA expands densely on
CPU. Both are checked to agree before they are timed. Weights that are read also cost: with few tokens, each of which
brings its own experts, time follows the number of different experts that the tokens chose.
"""

import argparse
import datetime
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qwen2_jax import ops
from qwen2_jax.config import ModelConfig
from qwen2_jax.moe import SparseMLP
from qwen2_jax.params import Declare


def make_layer(experts: int, args: argparse.Namespace) -> SparseMLP:
    """One sparse layer with random float32 weights; only its own sizes matter in the config."""
    config = ModelConfig(
        model_type="qwen2_moe",
        vocab_size=8,
        hidden_size=args.hidden,
        intermediate_size=args.width,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=experts,
        num_experts_per_tok=args.top_k,
        moe_intermediate_size=args.width,
        shared_expert_intermediate_size=args.width,
    )
    return SparseMLP(config, Declare(jax.random.key(experts), dtype=jnp.float32, std=0.02))


def transposed(layer: SparseMLP) -> list[jax.Array]:
    """The experts' weights as [E, in, out], which is what ragged_dot takes; made before the clock starts."""
    return [jnp.asarray(w[...].swapaxes(1, 2)) for w in (layer.gate_EFD, layer.up_EFD, layer.down_EDF)]


def ragged_dot_layer(layer: SparseMLP, weights: list[jax.Array], x_BTD: jax.Array) -> jax.Array:
    """What SparseMLP computes, with jax.lax.ragged_dot in place of the grouped matmuls."""
    gate, up, down = weights
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    p_ME = jax.nn.softmax(x_MD @ layer.router_ED[...].T, axis=-1)
    p_Mk, expert_Mk = jax.lax.top_k(p_ME, layer.top_k)
    order = ops.sort_by_expert(expert_Mk, p_ME.shape[-1])
    rows, sizes_E = ops.permute(x_MD, order), order.group_sizes_E
    hidden = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes_E)) * jax.lax.ragged_dot(rows, up, sizes_E)
    routed_MD = ops.unpermute(jax.lax.ragged_dot(hidden, down, sizes_E), p_Mk, order)
    shared_MD = jax.nn.sigmoid(x_MD @ layer.shared_gate_D[...])[:, None] * layer.shared(x_MD)
    return (routed_MD + shared_MD).reshape(x_BTD.shape)


def milliseconds(function: Callable[[], jax.Array], repeats: int) -> float:
    """Median time of a call that has been compiled and run once."""
    function().block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function().block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def measure(experts: int, tokens: int, args: argparse.Namespace) -> tuple[float, float]:
    """Milliseconds per call of (ours, ragged_dot) for `tokens` random tokens."""
    layer = make_layer(experts, args)
    graphdef, weights = nnx.split(layer)
    x_BTD = jax.random.normal(jax.random.key(tokens), (1, tokens, args.hidden))
    real_BT = jnp.ones((1, tokens), bool)
    ours = jax.jit(lambda w, x: nnx.merge(graphdef, w)(x, real_BT)[0])
    theirs = jax.jit(lambda w, t, x: ragged_dot_layer(nnx.merge(graphdef, w), t, x))
    mine, other = partial(ours, weights, x_BTD), partial(theirs, weights, transposed(layer), x_BTD)
    np.testing.assert_allclose(mine(), other(), rtol=1e-3, atol=1e-4)
    return milliseconds(mine, args.repeats), milliseconds(other, args.repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 16, 32, 64], help="default: %(default)s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1], help="per call (default: %(default)s)")
    parser.add_argument("--top-k", type=int, default=4, help="experts per token (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=1024, help="model width (default: %(default)s)")
    parser.add_argument("--width", type=int, default=704, help="width of an expert (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls, median taken (default: %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: checks the benchmark, measures nothing")
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    args = parser.parse_args()
    if args.tiny:
        args.experts, args.tokens, args.hidden, args.width, args.repeats = [4, 8], [16, 1], 32, 32, 2
    lines = [
        "| tokens | experts | active | qwen2_jax ms | ragged_dot ms | ragged_dot / ours |",
        "|---|---|---|---|---|---|",
    ]
    for tokens in args.tokens:
        for experts in args.experts:
            ours, theirs = measure(experts, tokens, args)
            print(f"{tokens} tokens, {experts} experts: {ours:.2f} ms, ragged_dot {theirs:.2f} ms", file=sys.stderr)
            lines.append(f"| {tokens} | {experts} | {args.top_k} | {ours:.2f} | {theirs:.2f} | {theirs / ours:.1f} |")
    note = f"One layer, float32, model width {args.hidden}, expert and shared width {args.width}, top-{args.top_k}; "
    note += f"median of {args.repeats} calls; jax {jax.__version__}, {os.cpu_count()} logical cores."
    text = "\n".join(lines) + f"\n\n{note}\n"
    print(text)
    if args.record:
        with (Path(__file__).parent / "RESULTS.md").open("a", encoding="utf-8") as out:
            out.write(f"\n## {datetime.date.today()}: CPU, mixture-of-experts layer\n\n{text}")


if __name__ == "__main__":
    main()
