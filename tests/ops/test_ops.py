# SPDX-License-Identifier: Apache-2.0
"""The operations of the model on a mesh give what they give on one device, forward and backward (8 devices, in a
process of its own)."""

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from few import slow
from qwen2_jax import ops
from qwen2_jax.errors import UserError

SCRIPT = """
import sys
import jax, jax.numpy as jnp, numpy as np
from qwen2_jax import ops
from qwen2_jax.parallel import sharding

meshes = {
    axes: sharding.make_mesh(**{name: int(size) for name, size in (part.split("=") for part in axes.split())})
    for axes in sys.argv[2:]
}
wanted = sys.argv[1]  # in the names of the cases
random = np.random.default_rng(0)
draw = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)

def compare(name, function, differentiable):
    def results(differentiable):
        out, vjp = jax.vjp(lambda x: function(*x), differentiable)
        return out, vjp(weights)
    weights = draw(*jax.eval_shape(lambda x: function(*x), differentiable).shape)
    if wanted not in name:  # its numbers are drawn, so that those of the other cases are always the same
        return
    alone = jax.jit(results)(differentiable)
    for axes, mesh in meshes.items():
        arguments = jax.device_put(differentiable, sharding.sharding((), (), mesh))
        lowered = jax.jit(sharding.on(mesh, results)).lower(arguments)
        text, together = lowered.as_text(), lowered.compile()(arguments)
        assert "shard_map" in text or "manual" in text, name
        for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
            order = min(2e-5, 2**-19 * np.abs(a).max())  # sums in another order: 16 roundings of float32; 4 were seen
            np.testing.assert_allclose(b, a, atol=order, rtol=0, err_msg=f"{name}, {axes}")

B, T, H = 8, 12, 8
at = jnp.broadcast_to(jnp.arange(T), (B, T))
for N, K in ((8, 4), (6, 3)):  # heads that divide over tensor=2, and some that do not
    q, k, v = draw(3, B, T, N, H), draw(B, T, K, H), draw(B, T, K, H)
    where = {"q_positions_BT": at, "kv_positions_BS": at, "window": jnp.array([3, 12, 7, 5] * 2), "scale": 0.3}
    compare(f"attention {N}:{K}", lambda q, k, v: ops.attention((q[0],), k, v, **where), (q, k, v))
    compare(f"dual chunk {N}:{K}", lambda q, k, v: ops.attention(tuple(q), k, v, chunk_len=5, **where), (q, k, v))
    cached = lambda q, k, v: ops.cached_attention(
        (q,), k, v, 1, q_positions_BT=jnp.array([[11], [4], [-1], [7]] * 2), window=None, scale=None)
    compare(f"cached {N}:{K}", cached, (draw(B, 1, N, H), draw(2, B, K, T, H), draw(2, B, K, T, H)))

E, D, F, k = 8, 16, 12, 3
chosen = jnp.asarray(random.integers(0, E + 1, (B, T, k)))
compare("experts", lambda x, w, *m: ops.experts(x, chosen, w, *m),
        (draw(B, T, D), draw(B, T, k), draw(E, F, D) / 4, draw(E, F, D) / 4, draw(E, D, F) / 4))
few = chosen[:3, :1]  # rows that nothing divides: all devices have them all
compare("experts of few rows", lambda x, w, *m: ops.experts(x, few, w, *m),
        (draw(3, 1, D), draw(3, 1, k), draw(E, F, D) / 4, draw(E, F, D) / 4, draw(E, D, F) / 4))

for N, K in ((8, 4), (6, 3)):
    chunk = lambda q, k, v: ops.cached_attention(
        tuple(q), k, v, 1, chunk_len=5, q_positions_BT=at - jnp.array([0, 3, 12, 7] * 2)[:, None], window=6)
    compare(f"cached prefill {N}:{K}", chunk, (draw(3, B, T, N, H), draw(2, B, K, T, H), draw(2, B, K, T, H)))
    write = lambda cache, new: ops.write_cache(
        (cache,), 1, (new,), jnp.array([[11, 12], [4, -1], [-1, 0], [7, 8]] * 2))[0]
    compare(f"write {N}:{K}", write, (draw(2, B, K, T, H), draw(B, 2, K, H)))
    k, v, zeros = draw(B, T, K, H), draw(B, T, K, H), jnp.zeros((2, B, K, T), jnp.float32)
    def eight_bits(q):
        empty = jnp.zeros((2, B, K, T, H), jnp.int8)
        k8, v8, *scales = ops.write_cache((empty, empty, zeros, zeros), 1, (k, v), at)
        return ops.cached_attention((q,), k8, v8, 1, scales=tuple(scales), q_positions_BT=at[:, -1:])
    compare(f"cache of int8 {N}:{K}", eight_bits, (draw(B, 1, N, H),))
"""


@pytest.mark.parametrize(
    ("cases", "meshes"),
    [
        ("6:3", ["context=4 tensor=2"]),
        *slow(("", ["context=4 tensor=2", "data=2 fsdp=2 tensor=2"])),
        *slow(("", ["expert=4 tensor=2", "fsdp=8", "fsdp=2 expert=2 context=2"])),
    ],
    ids=lambda x: x if isinstance(x, str) else " and ".join(x),
)
def test_a_mesh_changes_nothing(cases, meshes):
    """One process for several meshes: what one device computes is compiled once.

    Quick: heads that do not divide. Those that do are in the models of train/test_meshes.py and infer/test_mesh.py,
    experts in parallel/test_expert_parallel.py.
    """
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, cases, *meshes],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("spec", ["attention=", "speed=xla", "attention=xla,", "xla=attention"])
def test_implementations_that_make_no_sense(spec):
    with pytest.raises(UserError, match=r"attention=NAME,decode=NAME,experts=NAME"):
        ops.check_implementation(spec)


@pytest.mark.parametrize(
    ("spec", "named"),
    [("fast", "attention has no 'fast'; choose from tpu, gpu, xla"), ("splash", "decode has no 'splash'")],
)
def test_implementations_that_nobody_has(spec, named):
    with pytest.raises(UserError, match=named):
        ops.check_implementation(spec)


@pytest.mark.parametrize("spec", [None, "xla", "attention=splash", "attention=tpu,decode=xla,experts=ragged_dot"])
def test_implementations_by_operation(spec):
    ops.check_implementation(spec)


def test_an_implementation_that_cannot_serve_is_the_callers_mistake():
    q, k = jnp.zeros((1, 3, 2, 64)), jnp.zeros((1, 3, 1, 64))
    at = jnp.arange(3)[None]
    with pytest.raises(UserError, match=r"asked for needs a gpu, this is a cpu \(cpu\); name another, or none"):
        ops.attention((q,), k, k, q_positions_BT=at, kv_positions_BS=at, implementation="gpu")
