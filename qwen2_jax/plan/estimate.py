# SPDX-License-Identifier: Apache-2.0
"""Estimate of a whole training step, memory and seconds, without compiling: cheap enough for hundreds of settings.

A search ranks by it before it compiles, and advice is the difference between two estimates. It knows what the compiled
steps were seen to do: weights gathered for the forward and the backward pass, their gradient scattered, activations
summed over the tensor axis, tokens sent to their experts, the head gathered and its gradient summed once.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qwen2_jax import ops
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.model import flops, lora
from qwen2_jax.model.cross_entropy import CHUNK
from qwen2_jax.parallel import sharding
from qwen2_jax.parallel.chips import Chip
from qwen2_jax.parallel.expert_exchange import SLACK
from qwen2_jax.plan import device_work
from qwen2_jax.plan.hlo import Collective
from qwen2_jax.plan.machine import Machine
from qwen2_jax.plan.roofline import Network, Seconds
from qwen2_jax.train.config import Run
from qwen2_jax.train.dry_run import kept_per_token
from qwen2_jax.weights.params import ParamSpec, Tree, is_spec

WEIGHT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int4": 0.625}  # of a frozen weight, with its scales
MOMENTS = {"adamw": 2, "adafactor": 0}  # float32 numbers per weight that an optimizer keeps; rows and columns are few


class Estimate(NamedTuple):
    """Of one step on each device."""

    bytes: float
    seconds: Seconds


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run on a mesh. specs: declarations of the model's parameters, model.declare(config)[1]."""

    run: Run
    config: ModelConfig
    specs: Tree
    machine: Machine
    mesh: Mesh

    @property
    def chip(self) -> Chip:
        return self.machine.chip

    def parts(self, name: str) -> int:
        """Number of parts into which the mesh splits the dimension called `name`."""
        return sharding.parts(sharding.axes_of(name, self.mesh), self.mesh)

    @property
    def tokens(self) -> float:
        """Tokens of one micro-batch on a device."""
        return self.run.rows * self.run.length / self.run.accumulate / self.parts("batch") / self.parts("length")

    @property
    def itemsize(self) -> int:
        """Bytes of one number of the activations."""
        return jnp.dtype(self.run.dtype).itemsize

    @property
    def exchange(self) -> str:
        """How tokens reach experts on other devices: a name of expert_exchange.NAMES."""
        choices = self.config.num_experts_per_tok
        return ops.exchange_of(self.run.implementation, self.parts("experts"), choices, self.itemsize)

    @property
    def buffer_rows(self) -> float:
        """Rows in the buffers of experts for each copy of a token: a gather has room for all tokens of all devices that
        hold experts, an exchange's window for SLACK times its own."""
        if self.parts("experts") == 1 or not self.config.num_experts:
            return 1.0
        return SLACK if self.exchange == "all_to_all" else self.parts("experts")

    @property
    def moved_per_token(self) -> float:
        """Numbers per token in all layers' activations, as memory traffic: kept_per_token, and the rows of experts'
        buffers beyond those that it counts."""
        config = self.config
        rows = (
            (self.buffer_rows - 1)
            * config.num_experts_per_tok
            * (2 * config.hidden_size + config.moe_intermediate_size)
        )
        return kept_per_token(config, None) + rows * sum(map(config.is_sparse, range(config.num_hidden_layers)))

    def held(self, trained: bool = False) -> int:
        """Number of parameters that a device holds; trained: of those that are trained."""
        specs = self.specs
        if trained and self.run.lora is not None:
            specs = lora.declare(self.config, self.run.lora)
        return sum(math.prod(self._place(spec).shard_shape(spec.shape)) for spec in _leaves(specs))

    def met(self, experts: bool | None = None) -> int:
        """Number of parameters that a device multiplies with: gathered over the axes that only shard storage. experts:
        of routed experts only, or of all others only."""
        total = 0
        for spec in _leaves(self.specs):
            if experts is not None and experts != ("experts" in spec.axes):
                continue
            parts = math.prod(self.parts(axis) for axis in spec.axes if axis != "embed")
            total += int(np.prod(spec.shape, dtype=np.int64)) // parts
        return total

    def _place(self, spec: ParamSpec) -> jax.sharding.NamedSharding:
        return sharding.sharding(spec.axes, spec.shape, self.mesh)


def estimate(setting: Setting) -> Estimate:
    """Bytes and seconds of one step."""
    return Estimate(_bytes(setting), _seconds(setting))


def activation_bytes(setting: Setting) -> float:
    """Bytes on a device for one micro-batch: what the backward pass needs, and a tile of logits with its gradient."""
    config = setting.config
    # Of one layer's experts, backward: tokens, gradients of their sums and of themselves, and four arrays in between,
    # which kept_per_token counts for the rows that there are.
    D, F, k = config.hidden_size, config.moe_intermediate_size, config.num_experts_per_tok
    rows = k * (setting.buffer_rows * (3 * D + 4 * F) - 4 * F) if config.num_experts else 0.0
    kept = setting.tokens * (kept_per_token(config, setting.run.remat) + rows) * setting.itemsize
    tile = min(CHUNK, setting.tokens)
    words = 0 if config.scores else config.vocab_size
    return kept + 2 * tile * words * 4 / setting.parts("vocab")


def _bytes(setting: Setting) -> float:
    run, config = setting.run, setting.config
    trained = setting.held(trained=True)
    moments = MOMENTS[run.optim.algorithm] if run.optim.muon is None else 1
    if run.optim.merging is not None:
        moments += 2 + (run.optim.merging.every > 1)  # the task vector, what rounding lost, the sum between merges
    total = 4.0 * trained * (1 + moments + (run.ema is not None))
    total += trained * (setting.itemsize if run.accumulate == 1 else 4 + setting.itemsize)
    if run.lora is not None:
        total += setting.held() * WEIGHT_BYTES[run.lora_base]
    elif setting.itemsize < 4:
        total += trained * setting.itemsize
    if setting.parts("embed") > 1:  # two layers' weights gathered, this one's and the next one's; the head and its sum
        layer = setting.met() / config.num_hidden_layers
        total += 2 * layer * setting.itemsize
        total += flops.head_parameters(config) / setting.parts("vocab") * (4 + setting.itemsize)
    return total + activation_bytes(setting)


def _seconds(setting: Setting) -> Seconds:
    run, config, mesh = setting.run, setting.config, setting.mesh
    state = 4 * setting.held(trained=True) * (3 + (run.ema is not None))
    kept = setting.tokens * run.accumulate * setting.moved_per_token * setting.itemsize
    cut = device_work.parts(config, mesh, run.rows // run.accumulate, run.length)
    work = device_work.train_work(
        config, setting.chip, cut, lengths=[run.length] * run.rows,
        remat=run.remat, frozen=run.lora is not None, accumulate=run.accumulate, state_bytes=state,
        weight_bytes=setting.met() * setting.itemsize, kept_bytes=kept,
    )  # fmt: skip
    return Seconds(work.compute, work.memory, _messages(setting))


def _messages(setting: Setting) -> float:
    run, config, mesh = setting.run, setting.config, setting.mesh
    network = Network(setting.machine, mesh)
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    A, L, width = run.accumulate, config.num_hidden_layers, setting.itemsize
    again = run.remat is not None
    total = 0.0

    def spend(kind: str, axes: tuple[str, ...], size: float, times: int) -> None:
        nonlocal total
        axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
        if axes:
            at = [mesh.axis_names.index(axis) for axis in axes]
            groups = np.moveaxis(ids, at, range(-len(at), 0)).reshape(-1, math.prod(mesh.shape[a] for a in axes))
            total += network.seconds(Collective(kind, int(size), times, tuple(map(tuple, groups[:1].tolist()))))

    stored = sharding.axes_of("embed", mesh)
    holders = sharding.axes_of("experts", mesh)
    for experts in (False, True):
        over = tuple(axis for axis in stored if not (experts and axis in holders))
        weights = setting.met(experts) / L * width
        spend("all-gather", over, weights, 2 * A * L)
        if run.lora is None:
            spend("reduce-scatter", over, weights, A * L)
    if run.lora is None:
        copies = tuple(axis for axis in sharding.axes_of("batch", mesh) if axis not in stored)
        spend("all-reduce", copies, setting.held() * width, A)
    head = flops.head_parameters(config) / setting.parts("vocab")
    spend("all-gather", stored, head * width, A)  # once for all chunks of the loss
    spend("all-reduce", sharding.axes_of("batch", mesh), head * 4, A)
    activations = setting.tokens * config.hidden_size
    spend("all-reduce", sharding.axes_of("mlp", mesh), activations * width, (4 + 2 * again) * A * L)
    keys = 2 * config.num_key_value_heads * config.head_dim / config.hidden_size * activations * setting.parts("length")
    spend("all-gather", sharding.axes_of("length", mesh), keys * width, (1 + again) * A * L)
    spend("reduce-scatter", sharding.axes_of("length", mesh), keys * width, A * L)
    sparse = A * sum(config.is_sparse(layer) for layer in range(L))
    if setting.exchange == "all_to_all":  # tokens and results forward, tokens and both gradients backward
        spend("ragged-all-to-all", holders, config.num_experts_per_tok * activations * width, 5 * sparse)
    else:  # tokens of all, their sums, and the gradients of both
        gathered = setting.parts("experts") * activations
        spend("all-gather", holders, gathered * width, (1 + again) * sparse)
        spend("reduce-scatter", holders, gathered * width, sparse)
        spend("all-gather", holders, gathered * 4, sparse)
        spend("reduce-scatter", holders, gathered * 4, sparse)
    return total


def _leaves(specs: Tree) -> list[ParamSpec]:
    return jax.tree.leaves(specs, is_leaf=is_spec)
