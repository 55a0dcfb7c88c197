# SPDX-License-Identifier: Apache-2.0
"""Plans of small models on real topologies, what they say, and what the command lines do with them."""

import dataclasses
import functools
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh
from rich.console import Console

from ahead_of_time import GPU_COMPILER, TPU_COMPILER
from qwen2_jax import PRESETS, checkpoint
from qwen2_jax.config import ModelConfig
from qwen2_jax.data.spec import Data, Source
from qwen2_jax.errors import UserError
from qwen2_jax.infer.cli import main
from qwen2_jax.model import decoder, flops
from qwen2_jax.parallel import sharding
from qwen2_jax.plan import architecture, command, device_work, estimate, infer, report, search, train
from qwen2_jax.plan.machine import parse
from qwen2_jax.plan.program import Program, device_bytes, refused
from qwen2_jax.plan.roofline import Seconds
from qwen2_jax.plan.shapes import form_shapes, shapes
from qwen2_jax.train import Lora, Mesh, Optim, Pretrain, Start, config_file

ROOT = Path(__file__).parents[2]
SMALL = ModelConfig(
    model_type="qwen2",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)


def small(**changes):
    fields = {"model": SMALL, "tokenizer": "none", "rows": 8, "length": 256, "steps": 10, "optim": Optim(lr=1e-3)}
    return Pretrain(data=Data(sources=(Source(path="nothing"),)), **{**fields, **changes})


def check(plan, run):
    """What every plan of a training step has to satisfy."""
    (part,) = plan.parts
    bytes_ = report.bytes_by_kind(part)
    assert sum(bytes_.values()) == part.program.bytes
    shards = plan.machine.devices
    assert bytes_["parameters"] == pytest.approx(4 * flops.parameters(SMALL) / shards, rel=0.01)
    assert bytes_["optimizer"] == pytest.approx(2 * bytes_["parameters"], rel=0.01)
    assert part.flops == flops.train_flops(SMALL, [run.length] * run.rows)
    assert plan.fits and plan.needed < 0.5 * 2**30
    low, high = part.rates["MFU"]
    assert 0 < low <= high < 1
    out = io.StringIO()
    report.show(plan, Console(file=out, width=120))
    for word in ("fits", "all-gather", "fsdp", "MFU", "tokens/s", "optimizer"):
        assert word in out.getvalue()
    again = json.loads(json.dumps(plan.as_json()))
    assert again["fits"] and again["programs"][0]["bytes"] == bytes_
    assert {row["kind"] for row in again["programs"][0]["collectives"]} >= {"all-gather", "all-reduce"}


@pytest.mark.parametrize("_", [pytest.param(0, marks=TPU_COMPILER)])
def test_a_training_step_on_tpu(_):
    run = small()
    check(train.plan(run, "v5e-4"), run)


@pytest.mark.slow  # quick: a whole run's step on an H100, test_full_size.py
@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU_COMPILER)])
def test_a_training_step_on_gpu(_):
    run = small(accumulate=2)
    plan = train.plan(run, "4xh100")
    check(plan, run)
    # The gradients of two micro-batches: everything inside the loop over them counts twice.
    assert any(row.times % 2 == 0 for row in plan.parts[0].traffic)


SPARSE = dataclasses.replace(
    SMALL, model_type="qwen2_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=128,
    shared_expert_intermediate_size=256, decoder_sparse_step=1, num_hidden_layers=3,
)  # fmt: skip


@pytest.mark.parametrize(
    "machine",
    [
        pytest.param("v5e-4", marks=TPU_COMPILER),
        pytest.param("4xh100", marks=[*GPU_COMPILER, pytest.mark.slow]),  # quick: test_expert_parallel.py
    ],
)
def test_tokens_go_to_their_experts_five_times_a_step(machine):
    """There and back forward; for the gradients tokens once more, and gradients there and back. The estimate knows."""
    run = small(model=SPARSE, mesh=Mesh(expert=4), remat="full", accumulate=2)
    job = train.prepare(run, machine)
    plan = train.describe(job, train.compile_step(job))
    (row,) = [row for row in plan.parts[0].traffic if row.kind == "ragged-all-to-all"]
    assert (row.axes, row.times) == (("expert",), 2 * 3 * 5)
    copies = run.rows * run.length // 4 * SPARSE.num_experts_per_tok
    assert row.bytes == 3 * 5 * copies * SPARSE.hidden_size * 2
    gathered = job.setting(dataclasses.replace(run, implementation="exchange=gather"))
    assert (job.setting(run).exchange, gathered.exchange) == ("all_to_all", "gather")
    assert gathered.moved_per_token > job.setting(run).moved_per_token
    assert estimate.activation_bytes(gathered) > estimate.activation_bytes(job.setting(run))
    assert job.setting(run).met(experts=True) + job.setting(run).met(experts=False) == job.setting(run).met()
    assert estimate.estimate(gathered).seconds.links != estimate.estimate(job.setting(run)).seconds.links


def test_experts_work_is_divided_by_their_axis_once():
    mesh = SimpleNamespace(shape={"fsdp": 2, "expert": 4, "tensor": 2}, axis_names=("fsdp", "expert", "tensor"))
    assert device_work.parts(SPARSE, mesh, 8)[:3] == (8, 16, 16)
    assert device_work.parts(SPARSE, mesh, 2)[:3] == (2, 4, 16)  # rows that the expert axis does not divide


def test_tokens_over_context_and_heads_that_are_filled_up():
    mesh = AbstractMesh((2, 4, 8), ("fsdp", "context", "tensor"))
    cut = device_work.parts(PRESETS["qwen2-7b"], mesh, 8, 4096)
    assert cut[:2] == (2, 64)
    assert cut.attention == 64 * 28 / 32
    assert device_work.parts(PRESETS["qwen2-72b"], mesh, 8).attention == 16  # 64 and 8 heads, tokens not divided


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU_COMPILER)])
def test_inference_on_gpu(_, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    job = infer.InferenceJob(context=1024, rows=2, dtype="int8")
    plan = infer.plan(str(tmp_path), "2xh100", job)
    prefill, decode = plan.parts
    cache = 2 * 1024 * flops.kv_bytes_per_token(SMALL)
    for part in plan.parts:
        assert part.program.arguments["cache"] == cache / 2  # heads over two devices
        assert part.program.arguments["parameters"] < 1.1 * flops.parameters(SMALL) / 2
    assert plan.mesh["tensor"] == 2 and plan.fits
    assert prefill.times == 2 and "all-reduce" in {row.kind for row in decode.traffic}
    # A step of all layers counts once, although it is a loop that makes up to 16 tokens.
    sums = sum(row.times for row in decode.traffic if row.kind == "all-reduce")
    assert 2 * SMALL.num_hidden_layers <= sums <= 2 * SMALL.num_hidden_layers + 8


@pytest.mark.parametrize("tensor", [1, 8])
def test_int8_halves_a_mixture_of_experts(tensor):
    """Two layers of the 57B-A14B: a byte for each number of a matrix, four for each of its outputs, no less."""
    config = dataclasses.replace(PRESETS["qwen2-57b-a14b"], num_hidden_layers=2)
    sizes = dict.fromkeys(sharding.AXES, 1) | {"tensor": tensor}
    mesh, specs = AbstractMesh(tuple(sizes.values()), tuple(sizes)), decoder.declare(config, unroll=True)[1]
    params = form_shapes(specs, mesh, "int8", sharding.SERVING)
    E, D, F = config.num_experts, config.hidden_size, config.moe_intermediate_size
    gate_and_up, down = 2 * E * (F * D + 4 * F), E * (D * F + 4 * D * tensor)  # each device has the scales of `down`
    assert device_bytes(infer._experts(params)) == 2 * (gate_and_up + down) / tensor
    plain = device_bytes(shapes(specs, mesh, jnp.bfloat16, sharding.SERVING))
    assert 0.5 < device_bytes(params) / plain < 0.51
    params = form_shapes(specs, mesh, "int4", sharding.SERVING)
    group = min(64, F // tensor)  # whole groups on every device
    gate_and_up, down = 2 * E * F * D * (1 / 2 + 8 / 64), E * D * F * (1 / 2 + 8 / group)
    assert device_bytes(infer._experts(params)) == 2 * (gate_and_up + down) / tensor


def test_words_of_the_compiler():
    refusal = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (240.00G) exceeds available HBM (15.75G). HLO module: jit__lambda."
    )
    assert refused(refusal) == 240 * 2**30
    assert refused("RESOURCE_EXHAUSTED: something else") is None
    assert refused("INVALID_ARGUMENT (1.00G) exceeds available HBM") is None


def plan_of(needed_gib, machine="8xh100", known=True):
    program = Program("step", {"parameters": 2**30}, 0, int((needed_gib - 1) * 2**30), 0, (), 0.1, 1.0, 1.0, known)
    part = report.Part(program, {"gradients": 2**30}, 1e15, Seconds(1, 0, 0) if known else None, (), {})
    return report.Plan("a job", parse(machine), {"fsdp": 8}, {}, (part,))


def test_verdicts():
    assert plan_of(10).verdict.startswith("fits: 10.00 of the 75.67 GiB")
    assert plan_of(10).verdict.endswith("65.67 GiB (87%) to spare")
    assert "tight" in plan_of(75).verdict and plan_of(75).fits
    over = plan_of(80)
    assert not over.fits and "DOES NOT FIT: 80.00 GiB per device, 4.33 GiB more than" in over.verdict
    refused_ = plan_of(80, known=False)
    assert not refused_.fits and "at least 80.00" in refused_.verdict and refused_.step_seconds == float("inf")


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU_COMPILER)])
def test_advice_names_the_cheap_changes(_):
    run = small(model=PRESETS["qwen2-7b"], rows=64, length=4096, remat=None, accumulate=1)
    asked = train.prepare(run, "8xh100")
    needed = 95 * 2**30
    program = Program(
        "training step", {"parameters": 4 * 2**30, "optimizer": 8 * 2**30}, 0, needed - 12 * 2**30, 0, (), 0, 0, 0
    )
    made = train.describe(asked, program)
    assert not made.fits
    text = "\n".join(made.advice)
    assert "--remat full" in text and "--accumulate" in text and "along fsdp" in text and "adafactor" in text
    first = made.advice[0]
    assert " fits: about " in first  # those that suffice come first


def test_a_cache_that_heads_cannot_cut_further_is_cut_by_slots():
    gib = 2**30
    program = Program("decoding step, 1 rows", {"parameters": 2 * gib, "cache": 300 * gib}, 0, 0, 0, (), 0, 0, 0)
    mesh = dict.fromkeys(sharding.AXES, 1) | {"fsdp": 2, "tensor": 4}
    part = report.Part(program, {}, 0, None, (), {})
    made = report.Plan("qwen2-7b, inference", parse("8xh100"), mesh, {}, (part,))
    *_, last = infer.advice(PRESETS["qwen2-7b"], made, infer.InferenceJob(dtype="int8"), 1, 131072)
    assert last == "8 times as many devices with --mesh fsdp=2,context=8,tensor=4 fit: about 39.5 GiB per device"


def test_architectures_need_no_weights(tmp_path):
    assert architecture.named("qwen2-72b") is PRESETS["qwen2-72b"]
    assert architecture.named("Qwen/Qwen2-7B-Instruct") is PRESETS["qwen2-7b-instruct"]
    assert architecture.named("demo").num_hidden_layers > 0
    (tmp_path / "config.json").write_text(json.dumps(SMALL.to_hf()))
    assert architecture.named(str(tmp_path)) == SMALL
    with pytest.raises(UserError, match="did you mean qwen2-7b"):
        architecture.named("qwen2-7bb")


def test_architectures_of_files_that_hold_their_own(tmp_path):
    """GGUF has its config inside; a quantised folder's config.json is that of the model that is loaded."""
    quant = ROOT.parent / "shared/data/quant"
    if not quant.exists():
        pytest.skip(f"{quant} is not here")
    for name in ("gguf-moe", "gguf-split", "gptq-int4", "bnb-nf4"):
        source = checkpoint.locate(quant / name)
        for given in {str(quant / name), str(source.path)}:
            assert architecture.named(given) == checkpoint.read_config(source)
    (tmp_path / "config.json").write_bytes((quant / "gptq-int4/config.json").read_bytes())
    assert architecture.named(str(tmp_path)) == architecture.named(str(quant / "gptq-int4"))
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds no checkpoint"):
        architecture.named(str(tmp_path))


def test_a_run_may_start_from_what_another_configuration_will_write():
    path = ROOT / "configs/long_32k_7b.py"
    found = architecture.of_run(config_file.load(path), path)
    assert (found.rope_theta, found.max_position_embeddings) == (1e6, 32768)
    assert found.hidden_size == PRESETS["qwen2-7b"].hidden_size
    path = ROOT / "configs/moe_57b_a14b.py"
    assert architecture.of_run(config_file.load(path), path).num_experts == 64


def test_lengths_beyond_the_model_s_are_refused():
    run = small(model=None, tokenizer=None, start=Start(checkpoint="qwen2.5-3b"), length=2**16)
    with pytest.raises(UserError, match="max_position_embeddings"):
        architecture.of_run(run, None)


def test_default_meshes_of_inference():
    for preset, devices in (("qwen2-72b", 8), ("qwen2-72b", 16), ("qwen2-0.5b", 8), ("qwen2-57b-a14b", 8)):
        assert infer.default_mesh(PRESETS[preset], devices) == infer.sizes({"tensor": devices}, devices)
    sparse = infer.default_mesh(PRESETS["qwen2-57b-a14b"], 2048)
    assert sparse["tensor"] * sparse["expert"] == 2048
    assert sparse["expert"] > 1
    with pytest.raises(UserError, match="no axis banana"):
        infer.sizes({"banana": 2}, 8)
    found = infer.sizes({"tensor": 2, "fsdp": -1}, 8)
    assert {axis: size for axis, size in found.items() if size > 1} == {"fsdp": 4, "tensor": 2}


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU_COMPILER)])
def test_a_search_prefers_what_fits(_):
    run = small(model=PRESETS["qwen2-7b"], rows=64, length=4096)
    found = search.search(run, "8xh100")
    limit = parse("8xh100").chip.usable_gib * 2**30
    assert found and all(candidate.estimate.bytes <= limit for candidate in found)
    assert [c.seconds for c in found] == sorted(c.seconds for c in found)
    assert "--mesh.fsdp" in found[0].flags and "--accumulate" in found[0].flags
    with pytest.raises(UserError, match="the smallest needs about"):
        search.search(dataclasses.replace(run, model=PRESETS["qwen2-72b"]), "h100")


@pytest.mark.slow
@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU_COMPILER)])
def test_the_command_compiles_the_best_and_lists_the_rest(_, monkeypatch, capsys):
    monkeypatch.setattr(search, "COMPILED", 2)
    monkeypatch.setattr(train, "plan", functools.cache(train.plan))  # twice the same
    run, path = small(), Path("configs/small.py")
    candidates = search.search(run, "2xh100")
    assert command.train(run, "2xh100", path, search=True) == 0
    shown = capsys.readouterr().out
    compiled, _, estimated = shown.partition("estimated, not compiled")
    assert compiled.count("fits: ") == 2
    assert all(candidate.flags in compiled for candidate in candidates[:2])
    assert [line for line in estimated.splitlines() if "--mesh" in line] == [str(c) for c in candidates[2:12]]

    assert command.train(run, "2xh100", path, search=True, as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert {plan["flags"] for plan in told} == {candidate.flags for candidate in candidates[:2]}
    middle = [sum(plan["programs"][0]["seconds"][k] for k in ("overlapped", "not_overlapped")) for plan in told]
    assert middle == sorted(middle)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--plan", "8xh10"], "did you mean 8xh100"),
        (["--plan", "8xh100", "--ckpt", "qwen2-7bb"], "did you mean qwen2-7b"),
        (["--plan", "8xh100", "--context", "0"], "--context is 0"),
        (["--plan", "8xh100", "--ckpt", "qwen2-7b", "--context", "9999999"], "takes 2 to 131072"),
        (["--plan", "8xh100", "--batch", "0"], "--batch is 0"),
        (["--plan", "8xh100", "--mesh", "tensor"], "as in tensor=8"),
        (["--plan", "8xh100", "a prompt"], "give no prompt"),
    ],
)
def test_mistakes_on_the_command_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert main.main(arguments, plan=command.infer) == 2
    assert says in capsys.readouterr().err


def test_train_py_takes_the_plan_s_flags_away():
    sys.path.insert(0, str(ROOT))
    try:
        import train as script
    finally:
        sys.path.remove(str(ROOT))
    machine, how, flags = script._plan(["--plan", "v5p-256", "--optim.lr", "1e-3", "--json"])
    assert (machine, how, flags) == ("v5p-256", {"as_json": True, "search": False}, ["--optim.lr", "1e-3"])
    assert script._plan(["--rows", "4", "--json"]) == (None, {}, ["--rows", "4", "--json"])  # not ours without a plan


def test_upcycling_has_no_plan():
    path = ROOT / "configs/upcycle_57b_a14b.py"
    with pytest.raises(UserError, match="trains nothing"):
        command.train(config_file.load(path), "8xh100", path)


@pytest.mark.parametrize("_", [pytest.param(0, marks=GPU_COMPILER)])
def test_rows_and_meshes_that_do_not_divide(_):
    with pytest.raises(UserError, match="choose rows as a multiple of 16"):
        train.prepare(small(rows=8, accumulate=2), "8xh100")
    with pytest.raises(UserError, match="product must be 8"):
        train.prepare(small(mesh=Mesh(fsdp=3)), "8xh100")
    lora = small(model=None, tokenizer=None, start=Start(checkpoint="qwen2-0.5b"), lora=Lora(), lora_base="int8")
    asked = train.prepare(lora, "8xh100")
    assert {x.dtype for x in jax.tree.leaves(asked.frozen["stacks"])} >= {jnp.dtype("int8")}
    assert jax.tree.leaves(asked.trainer.abstract.params)
