# SPDX-License-Identifier: Apache-2.0
"""Online merging: each step's increment is merged with what an earlier stage had learned, against the alignment tax.

    tau = theta_SFT - theta_base          fixed for the run, which starts at theta_SFT
    theta += merge((1 - alpha) * F(d), alpha * F(tau))

d is Adam's increment, learning rate included, weight decay not; F keeps a share p of the entries (Lu et al. 2024,
arXiv:2405.17931, Eq. 2-7, Alg. 1 and 2). OnDARE keeps entries at random, and merging is adding; OnTIES keeps the
largest, and of two that contradict each other in sign one. alpha * tau is not multiplied by the learning rate: weights
move where that is 0, too.

The authors' program computes something else than their paper. Both are here; "code" differs in

* the survivors of OnDARE's F, which it divides by p
* F(tau) of OnDARE, which it draws once, before the run, not each step, and bounds by 1
* `rescale`: F(d) keeps the tensor's sum of magnitudes instead, bounded by 1 in OnDARE; in OnTIES F(tau) does, too
* OnTIES' signs: tau + d decides, unweighted, so tau (1e-3) vetoes d (1e-6); in the paper d is larger than alpha * tau
* OnTIES with p * n < 1 entries to keep of n: it keeps all of them, the paper none
* Adam's epsilon, which stands beside the square root before its bias is corrected (scale_by_early_epsilon)
* weight decay, which it takes from the new weights, not the old ones

Not taken over from it: with every > 1 it changes only the first tensor in steps that do not merge.

A tensor is one of a Hugging Face file: a layer, an expert.
"""

import dataclasses
import math
import zlib
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from qwen2_jax import checkpoint, validate
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.weights.params import ParamSpec, Tree, leaves

BOUND = 1.0  # of entries that OnDARE in variant "code" has multiplied up


@dataclasses.dataclass(frozen=True, kw_only=True)
class OnlineMerging:
    """Merges each update with an earlier stage's task vector, theta_SFT - theta_base."""

    base: str  # checkpoint that the earlier stage started from: name, Hub id or folder
    sft: str | None = None  # checkpoint that it ended in; None: the one this run starts from
    method: Literal["ondare", "onties"] = "ondare"
    variant: Literal["paper", "code"] = "paper"  # see the docstring above; "paper" shrinks OnDARE's updates to `keep`
    keep: float = 0.01  # share of a tensor's entries that survive
    alpha: float = 1e-7  # weight of the task vector; the paper searches 1e-7 .. 5e-6, and 1e-4 collapses
    every: int = 1  # steps between merges, plain Adam in between (Alg. 2)
    rescale: bool = False  # only variant "code"

    def __post_init__(self):
        validate.number(self, "merging", ("keep", "alpha"), float, 0.0)
        validate.number(self, "merging", ("every",), int, 1)
        validate.number(self, "merging", ("rescale",), bool)
        validate.choice("merging.method", self.method, ("ondare", "onties"))
        validate.choice("merging.variant", self.variant, ("paper", "code"))
        if not 0 < self.keep <= 1:
            raise UserError(f"merging.keep is {self.keep}; it is a share of the entries, above 0 and at most 1")
        if self.alpha > 1:
            raise UserError(f"merging.alpha is {self.alpha}; it is a weight from 0 to 1, such as 1e-7")
        if self.rescale and self.variant == "paper":
            raise UserError("merging.rescale goes together with variant 'code' only; the paper does not rescale")


class OnlineMergingState(NamedTuple):
    """Trees are like the parameters."""

    steps: jax.Array  # int32: updates so far
    tau: Tree  # what `task_vector` gives
    carry: Tree  # what rounding has kept from the weights: weights + carry is their value
    cache: Tree | None  # sum of the increments since the last merge, where every > 1


def online_merging(
    merging: OnlineMerging, specs: Tree, rate: optax.Schedule, *, decay: float, eps: float, seed: int
) -> optax.GradientTransformation:
    """The last transformation of a chain, for increments to which the learning rate has been applied.

    specs: declarations of the parameters. rate, decay: weight decay, decoupled, of matrices only; it is never
    sparsified. eps: Adam's. tau is 0 until `with_tau` fills it in.

    Masks are functions of seed, step, tensor and layer: the same on any mesh. With every > 1, the steps t = every,
    2 every, ... take back the increments since the last merge and merge their sum. Weight decay is not taken back.

    alpha * tau may be 1e-10, and a float32 weight of 0.02 has neighbours 2e-9 away: what rounding loses of a sum is
    kept in `carry` and added in the next step (Kahan 1965; the error is exact: Knuth's TwoSum). tau and carry are a
    float32 number per weight each, cache a third.
    """

    def init(params: Tree) -> OnlineMergingState:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)  # noqa: E731
        return OnlineMergingState(jnp.zeros((), jnp.int32), zeros(), zeros(), None if merging.every == 1 else zeros())

    def update(increments: Tree, state: OnlineMergingState, params: Tree | None = None):
        if params is None:
            raise ValueError("online merging needs the parameters")
        step = state.steps + 1
        fade = rate(state.steps) * decay
        merge = partial(_merge, merging, specs, jax.random.fold_in(jax.random.key(seed), step), eps)
        cache, total = state.cache, increments
        if cache is None:
            moves = merge(total, state.tau)
        else:
            total = jax.tree.map(jnp.add, cache, increments)

            def merged():
                moves = merge(total, state.tau)
                return jax.tree.map(jnp.subtract, moves, cache), jax.tree.map(jnp.zeros_like, cache)

            moves, cache = jax.lax.cond(step % merging.every == 0, merged, lambda: (increments, total))

        def wanted(spec: ParamSpec, move, param, carry):
            if spec.decay and decay:
                move = move - fade * (param if merging.variant == "paper" else param + move)
            # A barrier: a product fused into the sum with the weights would be rounded otherwise than in `_lost`.
            return jax.lax.optimization_barrier(move + carry)

        updates = _map(wanted, specs, moves, params, state.carry)
        carry = jax.tree.map(_lost, params, updates)
        return updates, OnlineMergingState(step, state.tau, carry, cache)

    return optax.GradientTransformation(init, update)  # type: ignore[arg-type]  # params are asked for


def task_vector(merging: OnlineMerging, specs: Tree, sft: Tree, base: Tree, *, seed: int) -> Tree:
    """sft - base, prepared once: OnTIES keeps the largest, and "code" draws OnDARE's mask here.

    To be called inside jit; seed as in `online_merging`, where step 0 is this mask's.
    """
    key = jax.random.fold_in(jax.random.key(seed), 0)
    tau = jax.tree.map(jnp.subtract, sft, base)
    if merging.method == "onties":
        return _largest(merging, specs, tau)
    if merging.variant == "paper":
        return tau

    def drawn(spec: ParamSpec, tau):
        return jnp.clip(jnp.where(_drawn(merging, spec, key), tau / merging.keep, 0), -BOUND, BOUND)

    return _map(drawn, specs, tau)


def load_tau(merging: OnlineMerging, specs: Tree, config: ModelConfig, params: Tree, mesh, *, seed: int) -> Tree:
    """The task vector for a run that starts at `params`, float32, where those are. Loads the one or two checkpoints."""
    load = partial(checkpoint.load_params, config=config, dtype="float32", mesh=mesh)
    sft = params if merging.sft is None else load(merging.sft)
    make = partial(task_vector, merging, specs, seed=seed)
    return jax.jit(make, donate_argnums=1, out_shardings=jax.tree.map(lambda x: x.sharding, params))(
        sft, load(merging.base)
    )


def with_tau(state, tau: Tree):
    """An optimizer's state, or any pytree that holds one, with tau in place of the zeros of `init`."""
    is_ours = lambda x: isinstance(x, OnlineMergingState)  # noqa: E731
    return jax.tree.map(lambda x: x._replace(tau=tau) if is_ours(x) else x, state, is_leaf=is_ours)


def scale_by_early_epsilon(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """Adam with epsilon beside the square root of the second moment before its bias is corrected.

    As if epsilon were eps / sqrt(1 - b2**t) in optax's: in the first step 32 times as large for b2 = 0.999.
    """
    adam = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)

    def update(grads, state, params=None):
        _, state = adam.update(grads, state, params)
        scale = jnp.sqrt(1 - b2**state.count) / (1 - b1**state.count)
        return jax.tree.map(lambda m, v: scale * m / (jnp.sqrt(v) + eps), state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, update)


def _merge(merging: OnlineMerging, specs: Tree, key: jax.Array, eps: float, d: Tree, tau: Tree) -> Tree:
    """The update of a step. tau: as `task_vector` returns it."""
    if merging.method == "ondare":
        return _map(partial(_ondare, merging, key, eps), specs, d, tau)
    return jax.tree.map(partial(_onties, merging), _largest(merging, specs, d), tau)


def _ondare(merging: OnlineMerging, key: jax.Array, eps: float, spec: ParamSpec, d: jax.Array, tau: jax.Array):
    kept = jnp.where(_drawn(merging, spec, jax.random.fold_in(key, 0)), d, 0)
    if merging.variant == "paper":
        tau = jnp.where(_drawn(merging, spec, jax.random.fold_in(key, 1)), tau, 0)
    elif merging.rescale:
        kept = jnp.clip(_rescaled(spec, d, kept, eps), -BOUND, BOUND)
    else:
        kept = kept / merging.keep
    return (1 - merging.alpha) * kept + merging.alpha * tau


def _onties(merging: OnlineMerging, d: jax.Array, tau: jax.Array):
    x, y = (1 - merging.alpha) * d, merging.alpha * tau
    if merging.variant == "paper":
        agree = jnp.sign(x) == jnp.sign(y)
        wins_x, wins_y = jnp.abs(x) >= jnp.abs(y), jnp.abs(y) >= jnp.abs(x)
        return jnp.where(agree | wins_x, x, 0) + jnp.where(agree | wins_y, y, 0)
    sign = jnp.where(d + tau >= 0, 1, -1)
    return jnp.where(jnp.sign(d) == sign, x, 0) + jnp.where(jnp.sign(tau) == sign, y, 0)


def _lost(param: jax.Array, update: jax.Array) -> jax.Array:
    """param + update - (param + update, rounded), exactly."""
    new = param + update
    back = new - param
    return (param - (new - back)) + (update - back)


def _drawn(merging: OnlineMerging, spec: ParamSpec, key: jax.Array) -> jax.Array:
    """True with probability `keep`, in the parameter's shape. Equal for stacked and unrolled parameters."""
    if merging.keep == 1:
        return jnp.ones(spec.shape, bool)
    key = jax.random.fold_in(key, zlib.crc32(spec.hf.encode()))
    bound = jnp.uint32(min(round(merging.keep * 2**32), 2**32 - 1))

    def draw(layer):
        return jax.random.bits(jax.random.fold_in(key, layer), shape, jnp.uint32) < bound

    if not spec.layers:
        shape = spec.shape
        return draw(0)
    shape = spec.shape[1:]
    return jax.vmap(draw)(jnp.asarray(spec.layers))


def _inside(spec: ParamSpec) -> tuple[int, ...]:
    """The dimensions of one tensor; those before it count layers and experts."""
    return tuple(range(bool(spec.layers) + ("{e}" in spec.hf), len(spec.shape)))


def _rescaled(spec: ParamSpec, before: jax.Array, after: jax.Array, eps: float) -> jax.Array:
    """`after` with the sum of magnitudes of `before`, tensor by tensor, except where that is near zero."""
    whole, left = (jnp.sum(jnp.abs(x), _inside(spec), keepdims=True) for x in (before, after))
    return after * jnp.where(whole >= 1e-8, whole / jnp.where(left > 0, left + eps, 1), 1)


def _largest(merging: OnlineMerging, specs: Tree, xs: Tree) -> Tree:
    """xs with all but the k = int(keep * n) entries of largest magnitude of each tensor of n set to 0.

    Of equal ones the first in the file's order are kept. Exact, and nothing is sorted or gathered: thresholds are
    searched bit by bit, for all tensors at once, then the positions up to which equal entries are kept. In float32 that
    is 31 + log2(largest n) times counting the entries: each time a read of all of them and, on a mesh, a sum over the
    devices of one integer per tensor.
    """
    if merging.keep == 1:
        return xs

    def share(spec: ParamSpec) -> int:
        n = math.prod(spec.hf_shape)
        return int(merging.keep * n) or (n if merging.variant == "code" else 0)

    def enough(spec, x, bound):
        return _count(spec, _bits(x) >= bound) >= share(spec)

    def few(spec, x, least, left, end):
        return _count(spec, (_bits(x) == least) & (_position(spec) < end)) <= left

    def one(spec, x, least, end):
        chosen = (_bits(x) > least) | ((_bits(x) == least) & (_position(spec) < end))
        kept = jnp.where(chosen, x, 0)
        return _rescaled(spec, x, kept, 0.0) if merging.rescale else kept

    dtype = jax.eval_shape(_bits, jax.tree.leaves(xs)[0]).dtype
    least = _search(lambda bounds: _map(enough, specs, xs, bounds), specs, dtype, 8 * dtype.itemsize - 1)
    left = _map(lambda spec, x, least: share(spec) - _count(spec, _bits(x) > least), specs, xs, least)
    width = max(math.prod(spec.hf_shape) for _, spec in leaves(specs)).bit_length()
    ends = _search(lambda ends: _map(few, specs, xs, least, left, ends), specs, jnp.uint32, width)
    return _map(one, specs, xs, least, ends)


def _bits(x: jax.Array) -> jax.Array:
    """Whole numbers in the order of the magnitudes."""
    return jax.lax.bitcast_convert_type(jnp.abs(x), f"uint{8 * x.dtype.itemsize}")


def _position(spec: ParamSpec) -> jax.Array:
    """The number of each entry in its tensor, in the file's order."""
    position = jnp.zeros(spec.shape, jnp.uint32)
    for dim in _inside(spec):
        position = position * spec.shape[dim] + jax.lax.broadcasted_iota(jnp.uint32, spec.shape, dim)
    return position


def _count(spec: ParamSpec, chosen: jax.Array) -> jax.Array:
    """How many entries of each tensor are true."""
    return jnp.sum(chosen, _inside(spec), dtype=jnp.int32, keepdims=True)


def _search(holds, specs: Tree, dtype, width: int) -> Tree:
    """For each tensor the largest number of `width` bits that `holds`: 0 does, and from some number on none does."""

    def bit(i, found: Tree) -> Tree:
        high = jnp.ones((), dtype) << (width - 1 - i).astype(dtype)
        higher = jax.tree.map(lambda x: x | high, found)
        return jax.tree.map(jnp.where, holds(higher), higher, found)

    def zero(spec: ParamSpec) -> jax.Array:
        first = _inside(spec)[0]
        return jnp.zeros(spec.shape[:first] + (1,) * (len(spec.shape) - first), dtype)

    return jax.lax.fori_loop(0, width, bit, _map(zero, specs))


def _map(f, specs: Tree, *trees: Tree) -> Tree:
    return jax.tree.map(f, specs, *trees, is_leaf=lambda leaf: isinstance(leaf, ParamSpec))
