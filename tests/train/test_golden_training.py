# SPDX-License-Identifier: Apache-2.0
"""Training equals transformers and torch: gradients of one batch and the losses of ten steps (golden/make_training.py).

The bar is 1e-5 of the largest value, in float32, through the step that train.py runs. transformers was given a document
per row. Ours gets the same documents once like that and once packed two to a row, and must arrive at the same numbers.
"""

import functools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import training_cases as cases
from few import slow
from qwen2_jax import model
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.train.config import Optim, Pretrain
from qwen2_jax.train.step import State, Trainer

GOLDEN = Path(__file__).parents[1] / "golden"
RTOL = 1e-5  # of the largest value of an array
OPTIM = Optim(
    lr=cases.PEAK, schedule="constant", warmup=cases.WARMUP, b1=cases.B1, b2=cases.B2, eps=cases.EPS,
    decay=cases.DECAY, clip=cases.CLIP,
)  # fmt: skip
# Both layouts have one shape, so that a model is compiled once; the packed one ends in two rows of padding.
ALONE, PACKED = ((0,), (1,), (2,), (3,)), (*cases.ROWS, (), ())
every_model = pytest.mark.parametrize("name", [x if x == "moe" else slow(x)[0] for x in cases.FIELDS])
every_layout = pytest.mark.parametrize("rows", [ALONE, PACKED], ids=["alone", "packed"])


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"training_{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def trainer_of(name: str) -> Trainer:
    config = ModelConfig.from_hf(cases.FIELDS[name])
    data = Data(sources=(Source(path="not read"),), packing="concat")
    run = Pretrain(
        model=config, tokenizer="demo", data=data, rows=len(ALONE), length=cases.LENGTH, optim=OPTIM,
        steps=cases.STEPS, dtype="float32", remat=None,
    )  # fmt: skip
    return Trainer(run, config, cases.STEPS)


def slots(name: str):
    """(tensor of a Hugging Face file, path of our parameter, where in it, shape)."""
    for tensor, slot in names.table(model.declare(trainer_of(name).config)[1]).items():
        yield tensor, slot.path, tuple(i for i in (slot.repeat, slot.expert) if i is not None), slot.shape


def start(name: str) -> State:
    """The state before the first step, with the weights of training_cases.py."""
    specs = trainer_of(name).specs
    flat: dict[tuple, np.ndarray] = {}
    for tensor, path, place, shape in slots(name):
        array = flat.setdefault(path, np.empty(names.get(specs, path).shape, np.float32))
        array[place] = cases.weight(tensor, shape).reshape(array[place].shape)
    return trainer_of(name).init(names.nested({path: jnp.asarray(array) for path, array in flat.items()}))


def batch_of(name: str, step: int, rows=PACKED) -> Batch:
    """The documents of a step; `rows`: which of them share a row."""
    documents = cases.documents(step, int(golden(name)["draw"]))
    shape = len(rows), cases.LENGTH
    batch = Batch(*(np.full(shape, x, t) for x, t in ((0, "i4"), (0, "i4"), (0, "f4"), (-1, "i4"), (-1, "i4"))))
    for row, numbers in enumerate(rows):
        at = 0
        for number in numbers:
            tokens, is_target = documents[number]
            here = row, slice(at, at + len(tokens))
            batch.tokens_BT[here], batch.segments_BT[here] = tokens, number
            batch.positions_BT[here] = np.arange(len(tokens))
            # As transformers has it, the model sees the last token of a document, and nothing is predicted from it.
            predicting = row, slice(at, at + len(tokens) - 1)
            batch.targets_BT[predicting], batch.weights_BT[predicting] = tokens[1:], is_target[1:]
            at += len(tokens)
    return batch


def step(name: str, state: State, batch: Batch) -> tuple[State, float, float]:
    """(state, loss as transformers reports it: with load balancing, gradient norm before clipping)."""
    state, metrics = trainer_of(name).step(state, batch)
    balancing = trainer_of(name).config.router_aux_loss_coef * metrics.get("moe/load_balancing", 0.0)
    return state, float(metrics["loss"] + balancing), float(metrics["gradient_norm"])


def error(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


@every_layout
@every_model
def test_gradients(name, rows):
    """Read from the first moments after one step, which are (1 - b1) times the clipped gradient."""
    g = golden(name)
    state, loss, norm = step(name, start(name), batch_of(name, 0, rows))
    assert error(loss, g["loss"]) <= RTOL
    assert error(norm, g["gradient_norm"]) <= RTOL
    scale = max(norm / cases.CLIP, 1.0) / (1 - cases.B1)
    moments = optax.tree.get(state.optimizer, "mu")
    gradients = {
        tensor: scale * np.asarray(names.get(moments, path), np.float64)[place].reshape(shape)
        for tensor, path, place, shape in slots(name)
    }
    assert {key for key in g if key.startswith("projection/")} == {f"projection/{tensor}" for tensor in gradients}
    for tensor, gradient in gradients.items():
        difference = np.abs(cases.projection(tensor, gradient) - g[f"projection/{tensor}"]).max()
        # By the gradient's size: a projection can be 0 by chance. A bias by its matrix's gradient, a sum over the same
        # tokens: that of the keys' bias nearly cancels, because softmax ignores what all keys have in common.
        size = np.linalg.norm(gradients[tensor.replace(".bias", ".weight")])
        assert difference <= RTOL * size, tensor
        if f"gradient/{tensor}" in g:
            assert error(gradient, g[f"gradient/{tensor}"]) <= RTOL, tensor


@pytest.mark.parametrize("fault", ["documents see each other", "positions go on", "prompts are targets"])
def test_wrong_packing_is_noticed(fault):
    batch = batch_of("dense_tied", 0)
    real = batch.segments_BT >= 0
    if fault == "prompts are targets":
        batch.weights_BT[real] = 1
    else:
        batch.segments_BT[real] = 0
    if fault == "positions go on":
        batch.positions_BT[real] = np.nonzero(real)[1]
    _, loss, _ = step("dense_tied", start("dense_tied"), batch)
    assert error(loss, golden("dense_tied")["loss"]) > 100 * RTOL


@every_layout
@every_model
def test_ten_steps(name, rows):
    """Warm-up, clipping, decay of matrices only, load balancing: the recording asserts that each of them moves a loss
    by at least a hundred times the tolerance."""
    state, losses, norms = start(name), [], []
    for number in range(cases.STEPS):
        state, loss, norm = step(name, state, batch_of(name, number, rows))
        losses.append(loss)
        norms.append(norm)
    assert error(losses, golden(name)["losses"]) <= RTOL
    assert error(norms, golden(name)["norms"]) <= RTOL
