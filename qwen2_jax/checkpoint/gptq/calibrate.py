# SPDX-License-Identifier: Apache-2.0
"""The matrices of one layer rounded to 4 bits by GPTQ, from the inputs that they get on a text.

A layer runs once as the model defines it, with weights that show the inputs x of their products; x x^T is added up. For
routed experts, each of which gets other rows, that is done beside it. In memory are one layer's weights and these sums:
I x I for each kind of matrix, and for each expert.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding

from qwen2_jax.checkpoint.by_layer import ByLayer, apply_layer, batches, layer_graph
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.gptq import rounding
from qwen2_jax.errors import CheckpointError
from qwen2_jax.model.mlp import route
from qwen2_jax.weights.params import ParamSpec, Tree, leaves
from qwen2_jax.weights.weight import StoredWeight, is_matrix, matmul, summed

# M rows (tokens)  I inputs  O outputs  D model width  F width of an expert

DAMP, FEW_DAMP, MOST_DAMP = 0.01, 0.1, 1.0  # of the mean of H's diagonal; the second with fewer tokens than inputs
LEADER = {"wk_KHD": "wq_NHD", "wv_KHD": "wq_NHD", "up_FD": "gate_FD", "up_EFD": "gate_EFD"}  # has the same inputs
SHARED_INPUT = ("moe", "shared", "gate_FD")  # of a sparse layer: its inputs are also those of the routed experts
Path = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Rounded:
    """One matrix after rounding. q_OI: uint8. scale_OG: float16. meant_OI: float32, what they stand for.

    error, plain_error: |(w' - w) x| / |w x| in root mean squares over the calibration inputs, with these integers and
    with plain rounding. tokens: rows that were seen. method: "gptq", with the damping where it was raised, or
    "rounding".
    """

    q_OI: np.ndarray
    scale_OG: np.ndarray
    meant_OI: np.ndarray
    error: float
    plain_error: float
    tokens: int
    method: str


def linears(specs: Tree) -> dict[Path, ParamSpec]:
    """The matrices of a layer that are rounded, from its declarations."""
    return {path: spec for path, spec in leaves(specs["blocks"][0]) if is_matrix(spec)}


def round_layer(model: ByLayer, i: int, params: Tree, x_NTD: np.ndarray, group: int) -> tuple[dict[str, Rounded], Tree]:
    """(the layer's matrices by the names of their modules, the layer's parameters with the rounded values).

    params: of layer i. x_NTD: what it gets. Raises CheckpointError that names a module whose numbers are not finite.
    """
    specs = model.specs["stacks"][i]
    declared, block = linears(specs), params["blocks"][0]
    for path, spec in declared.items():
        finite = jnp.isfinite(names.get(block, path)).reshape(-1, math.prod(spec.hf_shape)).all(axis=-1)
        if not bool(finite.all()):
            module = _module(spec, i, int(finite.argmin()))
            raise CheckpointError(f"{module}: its weights are not finite; nothing is written")
    sums, experts = _sums(model, i, params, x_NTD)
    tokens = x_NTD.shape[0] * x_NTD.shape[1]
    done: dict[str, Rounded] = {}
    values: dict[tuple, Any] = dict(leaves(block))
    for leader in dict.fromkeys(_leader(path) for path in declared):
        members = [path for path in declared if _leader(path) == leader]
        h_II = sums.pop(leader, None)
        if h_II is not None:
            modules = {_module(declared[p], i): _matrix(block, declared[p], p) for p in members}
            found = _round_together(modules, h_II, tokens, group)
            for path, one in zip(members, found.values(), strict=True):
                values[path] = jnp.asarray(one.meant_OI.reshape(values[path].shape))
            done |= found
            continue
        stacks = {path: np.array(values[path]) for path in members}
        for e, expert in enumerate(experts):
            h_II, modules = expert.h.pop(leader), {_module(declared[p], i, e): stacks[p][0, e] for p in members}
            found = _round_together(modules, h_II, expert.tokens, group)
            for path, one in zip(members, found.values(), strict=True):
                stacks[path][0, e] = one.meant_OI
            done |= found
        values |= {path: jnp.asarray(stack) for path, stack in stacks.items()}
    return done, {"blocks": {0: names.nested(values)}}


def _leader(path: Path) -> Path:
    return (*path[:-1], LEADER.get(path[-1], path[-1]))


def _module(spec: ParamSpec, layer: int, expert: int | None = None) -> str:
    name = spec.hf.removesuffix(".weight")
    return f"model.layers.{layer}.{name if expert is None else name.replace('{e}', str(expert))}"


def _matrix(block: Tree, spec: ParamSpec, path: Path) -> jax.Array:
    return names.get(block, path).reshape(-1, math.prod(spec.shape[-summed(spec) :]))


def _round_together(w: Mapping[str, Any], h_II: jax.Array, tokens: int, group: int) -> dict[str, Rounded]:
    """Matrices that have the same inputs, by name; h_II: sum of x x^T over `tokens` inputs x."""
    first = next(iter(w))
    w_OI = jnp.concatenate([jnp.asarray(one, jnp.float32) for one in w.values()])
    if not bool(jnp.isfinite(h_II).all()):
        raise CheckpointError(f"{first}: its inputs are not finite on this text; nothing is written")
    h_II = h_II / max(1, tokens)
    plain = _attempt(w_OI, None, group)
    best, method = plain, ["rounding"] * len(w)
    if tokens:
        u_II, dead_I, damp = _factor(h_II, FEW_DAMP if tokens < len(h_II) else DAMP)
        if u_II is not None:
            best = _attempt(jnp.where(dead_I, 0, w_OI), u_II, group)
            method = ["gptq" if damp == DAMP else f"gptq, damp {damp:g}"] * len(w)
    out, start = {}, 0
    for (name, one), how in zip(w.items(), method, strict=True):
        rows = slice(start, start + len(one))
        start += len(one)
        one = jnp.asarray(one, jnp.float32)
        size = float(rounding.output_error(one, h_II))
        error, plain_error = (
            float(rounding.output_error(jnp.asarray(meant_OI[rows]) - one, h_II)) for _, _, meant_OI in (best, plain)
        )
        chosen = best
        if not error <= plain_error:
            error, chosen, how = plain_error, plain, "rounding"
        q_OI, scale_OG, meant_OI = (part[rows] for part in chosen)
        if not np.isfinite(scale_OG).all():
            raise CheckpointError(f"{name}: its weights are too large for float16 scales; nothing is written")
        relative = [math.sqrt(max(0.0, e) / size) if size > 0 else 0.0 for e in (error, plain_error)]
        out[name] = Rounded(q_OI, scale_OG, meant_OI, relative[0], relative[1], tokens, how)
    return out


def _attempt(w_OI: jax.Array, u_II: jax.Array | None, group: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q_OI, scale_OG = (np.asarray(part) for part in rounding.rounded(w_OI, u_II, group))
    return q_OI, scale_OG, rounding.meant(q_OI, scale_OG)


def _factor(h_II: jax.Array, damp: float) -> tuple[jax.Array | None, jax.Array, float]:
    """(U or None, dead inputs, the damping that was needed)."""
    while True:
        u_II, dead_I = rounding.factor(h_II, jnp.float32(damp))
        if bool(jnp.isfinite(u_II).all()):
            return u_II, dead_I, damp
        if damp >= MOST_DAMP:
            return None, dead_I, damp
        damp *= 10


# ---------------------------------------------------------------------- the inputs of a layer's matrices


@partial(jax.tree_util.register_dataclass, data_fields=["weight"], meta_fields=["path", "seen"])
@dataclasses.dataclass(frozen=True, eq=False)
class Observed(StoredWeight):
    """A weight that puts the inputs of its products into `seen`, by its path; made and used in one traced function."""

    form: ClassVar[str] = "observed"

    weight: jax.Array
    path: Path
    seen: "Seen"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def matmul(self, x: jax.Array, contract: int, dtype) -> jax.Array:
        self.seen.inputs[self.path] = x.reshape(-1, math.prod(x.shape[-contract:]))
        return matmul(x, self.weight, contract=contract, dtype=dtype)

    def take(self, ids: jax.Array, dtype) -> jax.Array:
        raise NotImplementedError("the matrices of layers have products only")

    def dequantize(self) -> jax.Array:
        return self.weight

    def shardings(self, where: Sharding) -> "Observed":
        raise NotImplementedError("an observed weight stays inside one function")

    def along(self, spec: ParamSpec, axis: int, change: Callable[[jax.Array], jax.Array]) -> "Observed":
        raise NotImplementedError("an observed weight is not changed")


class Seen:
    """The inputs [M, I] of the products of one traced call, by the weight's path."""

    def __init__(self) -> None:
        self.inputs: dict[Path, jax.Array] = {}


@dataclasses.dataclass
class _Expert:
    """h: sums of x x^T, by the leader's path. tokens: rows that were sent to it."""

    h: dict[Path, jax.Array]
    tokens: int = 0


def _sums(model: ByLayer, i: int, params: Tree, x_NTD: np.ndarray) -> tuple[dict[Path, jax.Array], list[_Expert]]:
    """Sums of x x^T over the inputs of a layer's matrices, by the leader's path; for routed experts one by one."""
    graph, declared, config = layer_graph(model.config, i), linears(model.specs["stacks"][i]), model.config
    leaders = tuple(dict.fromkeys(_leader(path) for path in declared))
    widths = {path: math.prod(declared[path].shape[-summed(declared[path]) :]) for path in leaders}
    empty = lambda path: jnp.zeros((widths[path], widths[path]), jnp.float32)  # noqa: E731
    of_experts = [path for path in leaders if "{e}" in declared[path].hf]
    sums = {path: empty(path) for path in leaders if path not in of_experts}
    count = config.num_experts if of_experts else 0
    experts = [_Expert({path: empty(path) for path in of_experts}) for _ in range(count)]
    moe = params["blocks"][0].get("moe")
    for rows in batches(x_NTD):
        sums, x_MD, chosen_Mk = _observe(graph, config, tuple(sums), params, sums, x_NTD[rows])
        if not experts:
            continue
        x_MD, chosen_Mk = np.asarray(x_MD), np.asarray(chosen_Mk)
        for e, expert in enumerate(experts):
            mine = x_MD[(chosen_Mk == e).any(axis=-1)]
            if len(mine):
                padded = np.pad(mine, ((0, (1 << (len(mine) - 1).bit_length()) - len(mine)), (0, 0)))  # few programs
                expert.h = _add_expert(moe["gate_EFD"][0, e], moe["up_EFD"][0, e], expert.h, padded)
                expert.tokens += len(mine)
    return sums, experts


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def _observe(graph, config, leaders: tuple[Path, ...], params: Tree, sums, x_NTD):
    """(the sums with this batch's, and of a sparse layer what its experts get, and the experts of each row)."""
    seen, values = Seen(), dict(leaves(params["blocks"][0]))
    values |= {path: Observed(values[path], path, seen) for path in leaders}
    apply_layer(graph, config, {"blocks": {0: names.nested(values)}}, x_NTD)
    sums = {path: sums[path] + _squares(seen.inputs[path]) for path in leaders}
    if "moe" not in params["blocks"][0]:
        return sums, None, None
    x_MD = seen.inputs[SHARED_INPUT]
    chosen_Mk = route(x_MD, params["blocks"][0]["moe"]["router_ED"][0], config.num_experts_per_tok)[3]
    return sums, x_MD, chosen_Mk


@partial(jax.jit, donate_argnums=2)
def _add_expert(gate_FD, up_FD, h: dict[Path, jax.Array], x_MD) -> dict[Path, jax.Array]:
    hidden_MF = jax.nn.silu(matmul(x_MD, gate_FD)) * matmul(x_MD, up_FD)
    inputs = {"gate_EFD": x_MD, "down_EDF": hidden_MF}
    return {path: h_II + _squares(inputs[path[-1]]) for path, h_II in h.items()}


def _squares(x_MI: jax.Array) -> jax.Array:
    """x^T x, which a GPU or TPU would by default round."""
    return jax.lax.dot_general(x_MI, x_MI, (((0,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST)
