# SPDX-License-Identifier: Apache-2.0
"""One training step as a compiled function: loss, gradients over micro-batches, guard, update, metrics.

    sums over micro-batches -> gradient of the mean per target -> clip -> optimizer -> new float32 weights

Everything a step changes is in State, and the step is a function of (State, Batch) alone: that is what makes a resumed
run equal to one that never stopped.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from qwen2_jax import ops
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.model import decoder, head_padding, lora, mlp, rope
from qwen2_jax.model.mlp import RouterStats
from qwen2_jax.parallel import sharding
from qwen2_jax.train.batch_sharding import Placing
from qwen2_jax.train.objectives.batch_losses import NextToken, Objective, logprobs
from qwen2_jax.train.objectives.loss_sums import Sums
from qwen2_jax.train.optim import optimizer
from qwen2_jax.weights.params import ParamSpec, Tree, is_spec, leaves

if TYPE_CHECKING:
    from qwen2_jax.train.config import Guard, Run

# B batch  T query  E experts
Metrics = dict[str, Any]  # arrays, and under "ratios" pairs of them: see docs/metrics.md

SPIKES_FROM = 20  # applied steps before a loss can be called a spike: the mean must have settled
FORGETTING = 0.98  # of the running mean and variance of the loss, per step


class Health(NamedTuple):
    """The guard's state; float32 and int32 scalars."""

    mean: jax.Array  # running mean of the loss
    variance: jax.Array  # running variance of it
    applied: jax.Array  # steps that changed the weights
    skipped: jax.Array  # steps that did not
    in_a_row: jax.Array  # skipped steps since the last applied one


class State(NamedTuple):
    """Everything a step changes."""

    step: jax.Array  # int32: number of steps done, skipped ones included
    params: Tree  # trained, float32: the model's weights, or its adapters
    optimizer: optax.OptState
    ema: Tree | None  # average of params over steps
    health: Health


class Trainer:
    """The compiled functions of one run: `init`, `step`, `score`, `policy` and `logprobs`.

    specs: of the trained parameters. shardings: of a State, in its structure. place: puts batches on the devices.
    """

    def __init__(
        self,
        run: "Run",
        config: ModelConfig,
        steps: int,
        *,
        mesh: jax.sharding.Mesh | None = None,
        objective: Objective | None = None,
    ):
        """config: the model's architecture. steps: length of the run, for the learning rate's schedule. objective: what
        is minimised, by default the cross-entropy of the next token."""
        ops.check_implementation(run.implementation)
        self.run, self.config, self.mesh = run, config, mesh
        self.objective = objective or NextToken(run.z_loss)
        self.place = Placing(mesh)
        self.model_specs = decoder.declare(config)[1]
        self.heads = head_padding.spread(config, mesh)
        self.graphdef = decoder.declare(config if self.heads is None else self.heads.config)[0]
        self.specs = self.model_specs if run.lora is None else lora.declare(config, run.lora)
        self.tx = optimizer.make(run.optim, self.specs, steps, run.seed)
        self.rate = optimizer.schedule(run.optim.lr, run.optim, steps)
        self.rope = rope.plain(config)
        if run.long_context != "off":
            self.rope = rope.choose(config, run.length, run.long_context)
        self.balancing = config.router_aux_loss_coef if run.moe.load_balancing is None else run.moe.load_balancing
        self.abstract = jax.eval_shape(self._begin, abstract(self.specs))
        self.shardings = None if mesh is None else self._shardings(mesh)
        # Also on one device: without shardings Orbax restores to the devices that wrote the checkpoint.
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = self.shardings or jax.tree.map(lambda _: single, self.abstract)
        self.abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, shardings
        )
        self.begin = jax.jit(self._begin, out_shardings=self.shardings, donate_argnums=0)
        self.step = jax.jit(sharding.on(mesh, self._step), donate_argnums=0, out_shardings=self._outs())
        self.score = jax.jit(sharding.on(mesh, self._score))
        self.policy = jax.jit(sharding.on(mesh, self._policy))
        self.logprobs = jax.jit(sharding.on(mesh, self._logprobs))

    def random_params(self, seed: int) -> Tree:
        """Random weights of the model, float32, created with their shardings."""
        key = jax.random.key(seed)
        shardings = None if self.mesh is None else shardings_of(self.model_specs, self.mesh)
        make = lambda key: decoder.split(decoder.Qwen2(self.config, rngs=nnx.Rngs(key)))[1]  # noqa: E731
        return jax.jit(make, out_shardings=shardings)(key)

    def init(self, params: Tree | None = None) -> State:
        """The state before the first step. params: those to train; by default random weights from the run's seed."""
        if params is None:
            params = self.random_params(self.run.seed)
        if self.shardings is not None:
            params = jax.device_put(params, self.shardings.params)  # no copy if they are there already
        return self.begin(params)

    def weights(self, state: State, frozen: Tree | None = None) -> Tree:
        """The weights as they are exported: averaged where the run has an EMA, adapters merged.

        With export_dtype float32 the merged weights are float32, whatever the dtype of the base.
        """
        params = state.params if state.ema is None else state.ema
        if self.run.lora is None or frozen is None:
            return params
        dtype = jnp.float32 if self.run.export_dtype == "float32" else None
        return lora.merge(frozen, params, self.run.lora, dtype)

    def _begin(self, params: Tree) -> State:
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
        zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
        # An array of its own: two leaves of a donated state must not be one buffer.
        ema = None if self.run.ema is None else jax.tree.map(jnp.copy, params)
        return State(none, params, self.tx.init(params), ema, Health(zero, zero, none, none, none))

    def _shardings(self, mesh) -> State:
        """Of a State: parameters by their declarations, their moments likewise, everything else replicated."""
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = dict(leaves(shardings_of(self.specs, mesh)))
        by_path = {path: (spec.shape, shardings[path]) for path, spec in leaves(self.specs)}

        def of_leaf(path, leaf):
            keys = tuple(getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path)
            for start in range(len(keys)):
                shape, found = by_path.get(keys[start:], (None, whole))
                if shape == leaf.shape:
                    return found
            return whole

        return jax.tree.map_with_path(of_leaf, self.abstract)

    def _outs(self):
        return None if self.mesh is None else (self.shardings, NamedSharding(self.mesh, PartitionSpec()))

    def compute(self, params: Tree, frozen: Tree | None) -> Tree:
        """The weights of a forward pass: a copy in the run's dtype, with routers in float32."""
        dtype = jnp.dtype(self.run.dtype)
        cast = lambda spec, p: p if is_router(spec) else p.astype(dtype)  # noqa: E731
        if self.run.lora is None or frozen is None:
            return jax.tree.map(cast, self.model_specs, params, is_leaf=is_spec)
        return lora.attach(frozen, params, self.run.lora)

    def _forward(self, weights: Tree, batch: Batch) -> tuple[decoder.Qwen2, decoder.Output]:
        if self.heads is not None:
            weights = self.heads.widen(weights, self.model_specs)
        qwen2 = nnx.merge(self.graphdef, weights)
        output = qwen2(
            batch.tokens_BT,
            rope=self.rope,
            positions_BT=batch.positions_BT,
            segments_BT=batch.segments_BT,
            remat=self.run.remat,
            implementation=self.run.implementation,
        )
        return qwen2, output

    def _sums(self, weights: Tree, batch: Batch, counts) -> tuple[Sums, RouterStats | None]:
        qwen2, output = self._forward(weights, batch)
        return self.objective.sums(qwen2, output.hidden_BTD, batch, counts), output.router

    def _gradients(self, params: Tree, frozen: Tree | None, batch: Batch):
        """(sums over the batch, router's sums or None, gradient of the objective with respect to params, float32)."""
        counts = self.objective.counts(batch)
        tokens = (batch.segments_BT >= 0).sum().astype(jnp.float32)

        def objective(weights, part: Batch):
            weights = self.compute(weights, frozen) if frozen is not None else weights
            sums, router = self._sums(weights, part, counts)
            value = sums.objective
            if router is not None:
                # Not linear in the tokens: each micro-batch has its own, at its share of the step's tokens.
                share = (part.segments_BT >= 0).sum() / jnp.maximum(tokens, 1.0)
                value += share * self.balancing * mlp.load_balancing_loss(router)
                value += share * self.run.moe.router_z * mlp.router_z_loss(router)
            return value, (sums, router)

        # The gradient is taken with respect to the low-precision copy and added up in float32: no float32 gradient of
        # all weights exists per micro-batch besides the sum.
        weights = params if frozen is not None else self.compute(params, None)
        gradient = jax.grad(objective, has_aux=True)
        to32 = lambda grads: jax.tree.map(lambda g: g.astype(jnp.float32), grads)  # noqa: E731
        if self.run.accumulate == 1:
            grads, (sums, router) = gradient(weights, batch)
            return sums, router, to32(grads)
        count = self.run.accumulate
        parts = jax.tree.map(lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1), batch)

        def one(carry, part):
            grads, aux = gradient(weights, part)
            return jax.tree.map(jnp.add, carry, (to32(grads), aux)), None

        shapes = jax.eval_shape(gradient, weights, jax.tree.map(lambda x: x[0], parts))
        start = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
        (grads, (sums, router)), _ = jax.lax.scan(one, start, parts)
        return sums, router, grads

    def _step(self, state: State, batch: Batch, frozen: Tree | None = None) -> tuple[State, Metrics]:
        sums, router, grads = self._gradients(state.params, frozen, batch)
        loss = sums.loss.mean()
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums.objective) & jnp.isfinite(norm)
        good = finite & ~_spike(loss, state.health, self.run.guard) & (sums.loss.weight > 0)

        def apply():
            updates, opt = self.tx.update(grads, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                # Early on the decay is smaller, or a short run's average would be mostly the first weights.
                n = state.health.applied
                decay = jnp.minimum(self.run.ema, (1 + n) / (10 + n))
                ema = jax.tree.map(lambda e, p: e * decay + p * (1 - decay), ema, params)
            return params, opt, ema, _norms(updates, self.specs)

        def skip():
            zeros = jax.tree.map(jnp.zeros_like, _norms(grads, self.specs))
            return state.params, state.optimizer, state.ema, zeros

        # A branch and not a select: values that are not finite never reach the state, and no update is computed.
        params, opt, ema, updated = jax.lax.cond(good, apply, skip)
        health = _next(state.health, loss, good)
        metrics = {
            "loss": loss,
            "ratios": {"loss": sums.loss, **sums.metrics},
            "targets": batch.weights_BT.sum(),
            "tokens": (batch.segments_BT >= 0).sum(),
            "learning_rate": self.rate(_updates(state)),
            "gradient_norm": norm,
            "skipped": health.skipped,
            "skipped_in_a_row": health.in_a_row,
            **{f"gradient_norm/{name}": x for name, x in _norms(grads, self.specs).items()},
            **{f"update_norm/{name}": x for name, x in updated.items()},
            **_router_metrics(router, self.config),
        }
        return State(state.step + 1, params, opt, ema, health), metrics

    def _score(self, state: State, batch: Batch, frozen: Tree | None = None) -> Sums:
        """Sums over a held-out batch."""
        params = state.params if state.ema is None else state.ema
        return self._sums(self.compute(params, frozen), batch, self.objective.counts(batch))[0]

    def _policy(self, state: State, frozen: Tree | None = None) -> Tree:
        """The model's weights as a step uses them: the copy in the run's dtype, adapters attached."""
        return self.compute(state.params, frozen)

    def _logprobs(self, weights: Tree, batch: Batch) -> jax.Array:
        """log p of each target, float32 [B, T], with weights as `policy` gives them; 0 where nothing is a target."""
        qwen2, output = self._forward(weights, batch)
        return logprobs(qwen2, output.hidden_BTD, batch, self.objective.temperature)


def abstract(specs: Tree) -> Tree:
    """Shapes and dtypes of declared parameters, without arrays."""
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs, is_leaf=is_spec)


def shardings_of(specs: Tree, mesh: jax.sharding.Mesh, rules: Mapping = sharding.RULES) -> Tree:
    """The sharding of each declared parameter on the mesh."""
    return jax.tree.map(lambda s: sharding.sharding(s.axes, s.shape, mesh, rules), specs, is_leaf=is_spec)


def is_router(spec: ParamSpec) -> bool:
    """Whether this is a router's weight, which stays in float32: rounded logits would choose other experts."""
    return spec.hf == "mlp.gate.weight"


def group(spec: ParamSpec) -> str:
    """The part of the model that a parameter belongs to, for norms in the metrics."""
    if "norm" in spec.hf:
        return "norms"
    for part, name in (
        ("self_attn", "attention"),
        ("mlp.experts", "experts"),
        ("mlp.gate.", "router"),
        ("shared_expert_gate", "router"),
        ("mlp", "mlp"),
    ):
        if part in spec.hf:
            return name
    return "embedding"


def _norms(tree: Tree, specs: Tree) -> Metrics:
    """Euclidean norm of each group of parameters."""
    squares: dict[str, jax.Array] = {}
    for spec, x in zip(jax.tree.leaves(specs, is_leaf=is_spec), jax.tree.leaves(tree), strict=True):
        squares[group(spec)] = squares.get(group(spec), jnp.zeros(())) + jnp.sum(jnp.square(x.astype(jnp.float32)))
    return {name: jnp.sqrt(x) for name, x in sorted(squares.items())}


def _updates(state: State) -> jax.Array:
    """Number of updates so far, which is what the schedule counts: a skipped step does not move it."""
    return state.health.applied


def _spike(loss: jax.Array, health: Health, guard: "Guard") -> jax.Array:
    if guard.spike is None:
        return jnp.zeros((), bool)
    bound = health.mean + guard.spike * jnp.sqrt(health.variance)
    return (health.applied >= SPIKES_FROM) & (loss > bound)


def _next(health: Health, loss: jax.Array, good: jax.Array) -> Health:
    first = health.applied == 0
    difference = jnp.where(first, 0.0, loss - health.mean)
    mean = jnp.where(first, loss, health.mean + (1 - FORGETTING) * difference)
    variance = FORGETTING * (health.variance + (1 - FORGETTING) * difference**2)
    one = good.astype(jnp.int32)
    return Health(
        mean=jnp.where(good, mean, health.mean),
        variance=jnp.where(good, variance, health.variance),
        applied=health.applied + one,
        skipped=health.skipped + 1 - one,
        in_a_row=jnp.where(good, 0, health.in_a_row + 1),
    )


def _router_metrics(router: RouterStats | None, config: ModelConfig) -> Metrics:
    if router is None:
        return {}
    load_E = router.counts_E / jnp.maximum(router.tokens * config.num_experts_per_tok, 1.0)
    return {
        "moe/load_balancing": mlp.load_balancing_loss(router),
        "moe/router_z": mlp.router_z_loss(router),
        "moe/load": load_E,  # share of each expert; 1 / E each when balanced
        "moe/load_max": load_E.max() * config.num_experts,  # of the busiest expert, as a multiple of the mean
        # Rounded to parts per million: the counts are sums in float32.
        "moe/dropped": jnp.round((1 - load_E.sum()) * 1e6) / 1e6,
    }
