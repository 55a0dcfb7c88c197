# SPDX-License-Identifier: Apache-2.0
"""Training on this device: a few steps against the host's, and the speed and memory of a step."""

import dataclasses
import functools
import time

import jax
import numpy as np

import accelerator_cases
import training_cases
from qwen2_jax.config import PRESETS, ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.model import flops
from qwen2_jax.parallel import sharding
from qwen2_jax.plan import estimate, machine
from qwen2_jax.train.config import Optim, Pretrain
from qwen2_jax.train.step import Trainer
from tolerance import BFLOAT16, assert_no_worse

from .models import chip, on_host, share
from .pieces import Setting


def training(setting: Setting):
    """Three steps of tiny models in bfloat16: no worse than the host's bfloat16, measured by its float32."""
    names = ["dense_tied"] if setting.small else ["dense_tied", "moe"]
    return {name: functools.partial(_training, name) for name in names}


def training_steps(name):
    """{dtype/number: value} of the losses, gradient norms and weights of three steps, in both dtypes."""
    return {f"{dtype}/{what}": x for dtype in ("bfloat16", "float32") for what, x in _steps(name, dtype).items()}


def _steps(name, dtype):
    config = ModelConfig.from_hf(training_cases.FIELDS[name])
    trainer = _trainer(config, rows=4, length=32, dtype=dtype, remat=None)
    with jax.default_matmul_precision("highest"):
        state, losses, norms = trainer.init(), [], []
        for step in range(3):
            state, metrics = trainer.step(state, _batch(config, 4, 32, step))
            losses.append(metrics["loss"])
            norms.append([metrics[key] for key in sorted(metrics) if key.startswith("gradient_norm")])
    weights = {f"weight{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(state.params))}
    return {"losses": np.array(losses), "norms": np.array(norms)} | weights


def _training(name):
    theirs, ours = on_host("training.training_steps", name), _steps(name, "bfloat16")
    shares = [
        assert_no_worse(x, theirs[f"bfloat16/{what}"], theirs[f"float32/{what}"], floor=BFLOAT16)
        for what, x in ours.items()
    ]
    return {"of tolerance": max(shares)}


def _trainer(config, *, rows, length, dtype="bfloat16", remat="full"):
    run = Pretrain(
        model=config, tokenizer="demo", data=Data(sources=(Source(path="not read"),), packing="concat"), rows=rows,
        length=length, steps=1000, optim=Optim(lr=1e-3, schedule="constant"), dtype=dtype, remat=remat,
    )  # fmt: skip
    return Trainer(run, config, 1000)


def _batch(config, rows, length, seed=0):
    ids = np.random.default_rng(seed).integers(1, config.vocab_size, (rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), ids.shape)
    return Batch(ids, np.roll(ids, -1, axis=1), np.ones(ids.shape, np.float32), np.zeros_like(ids), positions)


def speed_training(setting: Setting):
    return {
        f"remat {remat}": functools.partial(_speed_training, remat, setting)
        for remat in (("full",) if setting.small else ("full", "dots"))
    }


def _speed_training(remat, setting):
    """A step of four layers of 7B's width: speed, and the device's memory beside what a plan says."""
    config = accelerator_cases.DENSE if setting.small else dataclasses.replace(PRESETS["qwen2-7b"], num_hidden_layers=4)
    rows, length, device = (2, 64, jax.devices()[0]) if setting.small else (4, 4096, jax.devices()[0])
    trainer, batch = _trainer(config, rows=rows, length=length, remat=remat), _batch(config, rows, length)
    state = trainer.init()
    compiled = trainer.step.lower(state, batch).compile()
    memory, seconds = compiled.memory_analysis(), []
    for _ in range(2 if setting.small else 5):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - start)
    assert np.isfinite(loss), f"the loss is {loss}"
    best, here, gib = min(seconds), chip(), 2**30
    numbers = {"tokens/s": rows * length / best, "ms": 1e3 * best, "loss": loss}
    numbers["MFU"] = share(flops.train_flops(config, [length] * rows), best, here and here.peak.tflops * 1e12)
    numbers["compiled GiB"] = (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / gib
    if stats := device.memory_stats():
        numbers["peak GiB"] = stats["peak_bytes_in_use"] / gib
    if here is not None:
        where = machine.Machine("this one", here, 1, (1,) * max(1, here.dims))
        mesh = jax.sharding.Mesh(np.array([device]).reshape([1] * len(sharding.AXES)), tuple(sharding.AXES))
        plan = estimate.estimate(estimate.Setting(trainer.run, config, trainer.model_specs, where, mesh))
        numbers |= {"plan GiB": plan.bytes / gib, "plan ms": 1e3 * plan.seconds.exposed, "floor": "MFU 45%"}
    return numbers
