# SPDX-License-Identifier: Apache-2.0
"""Names that end in dimension letters agree with the arrays they name, by the legend in docs/architecture.md.

Declared parameters are compared letter by letter with the names of their axes. Everywhere else, functions are looked at
as they return, while the model, the losses and the decode loop are traced: nothing is compiled.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen2_jax import model
from qwen2_jax.data.spec import Data, PromptData, Source
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.infer.engine.buckets import Buckets
from qwen2_jax.infer.engine.programs import Generator
from qwen2_jax.infer.engine.sampling import RowParams
from qwen2_jax.infer.engine.sampling_params import Constraints, SamplingParams
from qwen2_jax.model.lora import Lora
from qwen2_jax.rewards import RewardFunction
from qwen2_jax.train import Dpo, Grpo, Optim, Policy, Pretrain, Reward, Sampling, Start
from qwen2_jax.train.stage import stage_of
from qwen2_jax.train.step import Trainer, abstract
from qwen2_jax.weights.params import leaves
from tiny import CONFIGS

ROOT = Path(__file__).parents[1]
WATCHED = (f"{ROOT}/qwen2_jax/", f"{ROOT}/kernels/")
LETTERS = re.compile(r"_*[a-z][a-z0-9_]*_([A-Z1][A-Za-z12]*)")
# Logical axis of a declared parameter -> its letter.
AXES = {
    "layers": "R", "embed": "D", "heads": "N", "kv_heads": "K", "head_dim": "H", "mlp": "F", "experts": "E",
    "vocab": "V", "score": "1",
}  # fmt: skip


def letters_of(name: str) -> str | None:
    """The dimension letters that a name ends in."""
    found = LETTERS.fullmatch(name)
    return found and found[1]


def contradictions(values: Iterable[tuple[str, object]]) -> list[str]:
    """Arrays with another number of dimensions than letters, and letters with two sizes; a size of 1 is broadcast."""
    named = ((name, letters_of(name), getattr(value, "shape", None)) for name, value in values)
    shapes = [(name, letters, shape) for name, letters, shape in named if letters and isinstance(shape, tuple)]
    found = [f"{name} has the shape {shape}" for name, letters, shape in shapes if len(letters) != len(shape)]
    sizes: dict[str, tuple[int, str]] = {digit: (int(digit), f"the name {digit}") for digit in "12"}
    for name, letters, shape in shapes:
        for letter, size in zip(letters, shape, strict=True) if len(letters) == len(shape) else ():
            first, where = sizes.setdefault(letter, (size, name)) if size != 1 else (1, name)
            if first != size:
                found.append(f"{letter} is {first} in {where} and {size} in {name}")
    return found


def fields_of(value: object) -> list[tuple[str, object]]:
    """The fields of a dataclass or NamedTuple instance; none of one that is stacked for a scan."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = list(zip(value._fields, value, strict=True))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    else:
        return []
    extra = {len(x.shape) - len(letters_of(name)) for name, x in fields if letters_of(name) and hasattr(x, "shape")}
    return [] if extra == {1} else fields


@contextlib.contextmanager
def watching(found: set[str]):
    """Adds what contradicts a name in any function of ours that returns meanwhile, and in records that it holds."""
    jax.clear_caches()  # what another test traced would not be executed here
    monitoring, returns = sys.monitoring, sys.monitoring.events.PY_RETURN
    tool = next(tool for tool in range(6) if monitoring.get_tool(tool) is None)

    def returned(code, offset, value):
        if not code.co_filename.startswith(WATCHED):
            return monitoring.DISABLE  # this function; costs nothing from now on
        names = list(sys._getframe(1).f_locals.items())
        for values in (names, *(fields_of(value) for _, value in names)):
            at = f"{Path(code.co_filename).relative_to(ROOT)}: {code.co_qualname}"
            found.update(f"{at}: {text}" for text in contradictions(values))
        return None

    monitoring.use_tool_id(tool, "dimension letters")
    try:
        monitoring.register_callback(tool, returns, returned)
        monitoring.set_events(tool, returns)
        yield
    finally:
        monitoring.set_events(tool, 0)
        monitoring.register_callback(tool, returns, None)
        monitoring.free_tool_id(tool)


def test_a_wrong_name_is_found():
    found: set[str] = set()
    names: dict = {}
    source = "def planted(wq_NHD, k_BSKH):\n    x_ND = wq_NHD\n    return x_ND\n"
    exec(compile(source, f"{ROOT}/qwen2_jax/planted.py", "exec"), names)
    with watching(found):
        names["planted"](np.zeros((4, 8, 16)), np.zeros((2, 3, 1, 9)))
    where = "qwen2_jax/planted.py: planted: "
    assert found == {where + "x_ND has the shape (4, 8, 16)", where + "H is 8 in wq_NHD and 9 in k_BSKH"}


def test_the_letters_of_parameters_are_their_axes():
    heads = [dataclasses.replace(CONFIGS["dense"], score_head=head) for head in ("linear", "two_layers")]
    for config in (*CONFIGS.values(), *heads):
        for path, spec in leaves(model.declare(config)[1]):
            letters = "".join(AXES[axis] for axis in spec.axes[bool(spec.layers) :])
            assert (letters_of(path[-1]), len(spec.shape)) == (letters, len(spec.axes)), path


def test_every_letter_is_in_the_legend():
    section = (ROOT / "docs/architecture.md").read_text().split("## Letters of dimensions")[1].split("## ")[0]
    table = [cell.strip() for row in section.splitlines() if row.startswith("|") for cell in row.split("|")]
    legend = {letter for cell in table for letter in cell.split(", ") if len(letter) == 1}
    unknown = {}
    for path in sorted((ROOT / "qwen2_jax").rglob("*.py")):
        for name in set(re.findall(r"\w+", path.read_text(encoding="utf-8"))):
            if not name.startswith(("visit_", "atleast_")) and set(letters_of(name) or "") - legend - {"1", "2"}:
                unknown[name] = str(path.relative_to(ROOT))
    assert not unknown, f"letters that docs/architecture.md does not explain: {unknown}"


FILES = {"start": Start(checkpoint="none is read here"), "optim": Optim(lr=1e-3), "steps": 4, "rows": 4, "length": 32}
PAIRS = FILES | {"data": Data(sources=(Source(path="none.jsonl"),), packing="best_fit")}
ASKED = {
    "data": PromptData(sources=("none.jsonl",), max_tokens=8),
    "rewards": (RewardFunction(function="number"),),
    "prompts": 4,
    "sampling": Sampling(samples=2, max_new_tokens=8, rows=8),
}
NEW = {"model": None, "tokenizer": None}
STEPS = {
    "pretrain": ("moe", Pretrain(**PAIRS | {"accumulate": 2, "remat": "full"} | NEW)),
    "adapters": ("dual_chunk", Pretrain(**PAIRS | {"long_context": "dca", "lora": Lora(rank=2)} | NEW)),
    "reward": ("sliding", Reward(**PAIRS)),
    "dpo": ("dense", Dpo(**PAIRS)),
    "grpo": ("untied", Grpo(policy=Policy(kl=0.1), **ASKED | FILES)),
}


@pytest.mark.parametrize("name", STEPS)
def test_names_in_a_training_step(name):
    base, run = STEPS[name]
    config, found = CONFIGS[base], set()
    if name == "reward":
        config = dataclasses.replace(config, score_head="two_layers")
    kinds = Batch(jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32, *[jnp.float32] * 4)
    batch = jax.tree.map(lambda dtype: jax.ShapeDtypeStruct((run.rows, run.length), dtype), kinds)
    with watching(found):
        trainer = Trainer(run, config, 4, objective=stage_of(run).objective(groups=3, ranks=2))
        frozen = None if run.lora is None else abstract(trainer.model_specs)
        jax.eval_shape(trainer._step, trainer.abstract, batch, frozen)
    assert not found, "\n".join(sorted(found))


@pytest.mark.parametrize(("base", "long_context"), [("moe", "off"), ("dual_chunk", "dca")])
def test_names_in_generation(base, long_context):
    config, found = CONFIGS[base], set()
    graphdef, specs = model.declare(config)
    rows = [
        SamplingParams(max_new_tokens=8, temperature=1.0, top_p=0.9, top_k=5, repetition_penalty=1.2),
        SamplingParams(max_new_tokens=4, constraints=Constraints(no_repeat_ngram_size=2, min_new_tokens=2)),
    ]
    with watching(found):
        place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract(specs))
        generator = Generator(graphdef, params, config, dtype=jnp.float32, buckets=Buckets.of(config))
        tokens, length = [[5, 6, 7], [8, 9]], 64
        row_params = RowParams.stacked(rows, vocabulary=config.vocab_size)
        tables = generator.rotary_tables([64, 64], 2, length, long_context)
        programs, shapes = generator.for_cache(2, length), generator.cache_shapes(2, length)
        ((tokens_BT, positions_BT, targets_BT),) = generator.buckets.side_by_side(tokens, 2, tokens)
        chunk = (generator.params, shapes, tokens_BT, positions_BT)
        context_B = np.array([3, 2], np.int32)
        jax.eval_shape(programs.prefill, *chunk, context_B, tables)
        jax.eval_shape(programs.score, *chunk, targets_BT, context_B, tables)
        jax.eval_shape(generator._forward, generator.params, tokens_BT, positions_BT, context_B, tables)
        state = generator._state(generator.new_cache(2, length), tokens, 2, row_params)
        jax.eval_shape(programs.decode, generator.params, state, row_params, tables, np.zeros(2, bool), 4)
    assert not found, "\n".join(sorted(found))
