# SPDX-License-Identifier: Apache-2.0
"""python -m qwen2_jax.kernels.bench: tables, JSON, counts without hardware, and one clear line for what is wrong."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen2_jax.kernels import bench, workloads
from qwen2_jax.kernels.chip_limits import CHIPS, chip_of
from qwen2_jax.kernels.target import KINDS

from few import slow

TINY = {
    "flash_attention": "T=24,N=4,K=2,H=8,window=9",
    "dual_chunk_attention": "T=24,N=2,K=1,H=8,chunk_len=7",
    "decode_attention": "S=32,N=4,K=2,H=8,page=16,int8=1,chunk_len=9",
    "grouped_matmul": "M=24,E=4,D=16,F=8",
    "grouped_swiglu": "M=24,E=4,D=16,F=8",
    "weight_only_matmul": "M=3,O=24,I=64,group=32,offset=1",
    "grouped_weight_only": "M=24,E=4,D=64,F=8,group=32,offset=1",
}
TIMED = ("flash_attention", "grouped_matmul")  # an attention with its rivals, and a product with both passes


@pytest.mark.parametrize("operation", [x if x in TIMED else slow(x)[0] for x in workloads.OPERATIONS])
def test_every_operation_is_timed_beside_its_rivals(operation, tmp_path, capsys):
    file, record = tmp_path / "numbers.json", tmp_path / "RESULTS.md"
    passes = ["forward", "backward"] if operation == "grouped_matmul" else ["forward"]
    arguments = [operation, "--shape", TINY[operation], "--repeat", "2", "--passes", *passes]
    assert bench.main([*arguments, "--json", str(file), "--record", str(record)]) == 0
    text = capsys.readouterr().out
    (report,) = json.loads(file.read_text())
    ours = {name for table in workloads.OPERATIONS[operation].tables() for name in table}
    assert report["failed"] == {}
    rows = {(row["implementation"], row["pass"]): row for row in report["rows"]}
    assert {"xla", "reference"} <= {name for name, _ in rows}
    assert {name for name, _ in rows} - ours  # a rival
    assert {which for _, which in rows} == set(passes)
    for (name, which), row in rows.items():
        assert 0 < row["best_ms"] <= row["median_ms"]
        assert row["samples"] == 2
        assert row["ratio"] >= 1
        assert row["of_roofline"] is None  # a CPU has none
        assert (row["error"] is not None) == (name in ours)
        assert row["error"] is None or row["error"] < 0.02, (name, which)
        assert f"| {name} " in text
    assert "No roofline" in text
    assert f"jax {jax.__version__}" in text
    assert "Chosen if none is named: xla." in " ".join(text.split())
    assert record.read_text().startswith(f"\n## {report['date'][:10]}: {operation}, custom")


def test_passes_and_implementations_can_be_chosen(capsys):
    arguments = ["grouped_matmul", "--shape", TINY["grouped_matmul"], "--repeat", "1", "--dtype", "float32"]
    assert bench.main([*arguments, "--implementation", "xla", "--passes", "step", "--json", "-"]) == 0
    text = capsys.readouterr().out
    (report,) = json.loads(text[text.index("[\n") :])
    (row,) = report["rows"]
    assert (row["implementation"], row["pass"]) == ("xla", "step")
    assert row["error"] < 1e-5


def test_a_wrong_implementation_is_seen(monkeypatch):
    """Its speed is printed beside an error that nobody can overlook; one that raises is told and fails the run."""
    from qwen2_jax.kernels import grouped_matmul as grouped

    def broken(x, w, sizes, transpose_w):
        raise RuntimeError("no such instruction")

    wrong = lambda x, w, sizes, transpose_w: grouped.xla.grouped_matmul(2 * x, w, sizes, transpose_w=transpose_w)
    monkeypatch.setitem(grouped.IMPLEMENTATIONS, "wrong", wrong)
    monkeypatch.setitem(grouped.IMPLEMENTATIONS, "broken", broken)
    op = workloads.OPERATIONS["grouped_matmul"]
    shape = workloads.parse_shape("grouped_matmul", TINY["grouped_matmul"])
    wanted = ["xla", "wrong", "broken"]
    rows, refused, failed = bench.measure(op, shape, jnp.float32, ["forward"], wanted, 1, None)
    assert {row["implementation"]: row["error"] > 0.5 for row in rows} == {"xla": False, "wrong": True}
    assert not refused
    assert failed == {"broken": "RuntimeError: no such instruction"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["attention"], "invalid choice: 'attention'"),
        (["flash_attention", "--shape", "qwen2-9b train"], "'qwen2-9b train' is no shape of flash_attention"),
        (["flash_attention", "--shape", "T=64,N=4,Q=3"], "'Q=3' is not one of"),
        (["flash_attention", "--shape", "T=-1,N=4"], "'T=-1' is not one of"),
        (["flash_attention", "--shape", "N=4"], "lacks T"),
        (["flash_attention", "--shape", "T=64,N=4,K=3"], "N=4 query heads must be a multiple of K=3"),
        (["flash_attention", "--shape", "T=64,S=32,N=4"], "T=64 queries stand at the end of S=32 keys"),
        (["decode_attention", "--shape", "S=100,N=4,page=16"], "no whole number of pages of 16"),
        (["weight_only_matmul", "--shape", "M=1,O=8,I=100,group=32"], "group=32 divides I=100"),
        (["grouped_matmul", "--shape", "M=8,E=2,D=4,F=4", "--implementation", "cuda"], "'cuda' is not one of ['"),
        (["grouped_matmul", "--shape", "M=8,E=2,D=4,F=4", "--count", "--implementation", "cuda"], "'cuda' is not one"),
        (["flash_attention", "--shape", "T=64,N=4", "--chip", "v9"], "invalid choice: 'v9'"),
        (["flash_attention", "--shape", "T=64,N=4", "--repeat", "0"], "--repeat 0: at least 1"),
        (["flash_attention"], "the real shapes take hours on a CPU"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert says in error
    assert error.startswith("bench: ")
    assert len(error.splitlines()) == 1


def test_shapes_are_names_numbers_or_both(capsys):
    assert bench.main(["flash_attention", "--list"]) == 0
    assert "qwen2-7b train: B=4, T=4096, S=4096, N=28, K=4, H=128" in capsys.readouterr().out.splitlines()
    named = workloads.parse_shape("flash_attention", "qwen2-7b train")
    assert workloads.parse_shape("flash_attention", "qwen2-7b train, B=1") == {**named, "B": 1}
    assert workloads.parse_shape("flash_attention", "T=16,N=4") == {"T": 16, "N": 4, "B": 1, "S": 16, "K": 4, "H": 128}


# ---------------------------------------------------------------------- counting


@pytest.mark.parametrize("operation", [x if x != "dual_chunk_attention" else slow(x)[0] for x in workloads.OPERATIONS])
def test_count_needs_no_hardware(operation, tmp_path, capsys):
    """The kernels of a chip count themselves, and never less than the operation needs."""
    op, file = workloads.OPERATIONS[operation], tmp_path / "counted.json"
    name = next(name for name in op.shapes if name.startswith(("qwen2-7b", "qwen2-57b")))
    assert bench.main([operation, "--shape", name, "--count", "--chip", "v5p", "h200", "--json", str(file)]) == 0
    assert "Counted, not measured. v5p: 459 TFLOP/s, 2765 GB/s" in " ".join(capsys.readouterr().out.split())
    for report, kernel in zip(json.loads(file.read_text()), ("tpu", "gpu"), strict=True):
        chip, rows = CHIPS[report["chip"]], report["rows"]
        assert kernel in {row["implementation"] for row in rows}
        assert {row["pass"] for row in rows} == ({"forward", "backward"} if op.trained else {"forward"})
        for row in rows:
            least, bound = chip.seconds(row["flops"], row["hbm_bytes"])
            assert (row["roofline_ms"], row["bound"]) == (pytest.approx(1e3 * least), bound)
            assert row["flops_to_need"] >= 0.999
            if row["fast_memory_bytes"] is not None:
                assert 0 < row["fast_memory_bytes"] <= chip.fast_bytes


def test_needed_work_by_brute_force():
    shape = workloads.parse_shape("flash_attention", "B=2,T=5,S=12,N=4,K=2,H=8,window=4")
    at_T, at_S = np.arange(7, 12)[:, None], np.arange(12)
    seen = (at_S <= at_T) & (at_T - at_S < 4)
    assert workloads.pairs(shape) == 2 * seen.sum()
    assert workloads.keys_seen(shape) == seen.any(0).sum()
    need = workloads.OPERATIONS["flash_attention"].need
    forward, backward, step = (need(shape, jnp.bfloat16, which) for which in workloads.PASSES)
    assert forward.flops == 2 * 2 * (2 * seen.sum() * 4 * 8)
    assert backward.flops == 2.5 * forward.flops
    assert step.flops == forward.flops + backward.flops
    assert forward.hbm_bytes == 2 * (2 * 2 * 5 * 4 * 8 + 2 * 2 * 8 * 2 * 8)

    shape = {"M": 6, "E": 4, "D": 8, "F": 16}
    need = workloads.OPERATIONS["grouped_matmul"].need(shape, jnp.bfloat16, "forward")
    active = int((workloads.group_sizes(shape) > 0).sum())
    assert need == (2 * 6 * 8 * 16, 2 * (6 * 8 + 6 * 16 + active * 8 * 16))


# ---------------------------------------------------------------------- chips


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_a_chip_is_found_by_the_name_that_jax_has_for_it(chip):
    assert chip_of(chip.kind) == chip
    if chip.name in KINDS:
        assert chip.on.generation == chip.name
    assert chip.seconds(chip.tflops * 1e12 / chip.devices, 0) == (1, "compute")
    assert chip.seconds(0, chip.gb_s * 1e9 / chip.devices) == (1, "memory")


def test_other_devices_have_no_peaks():
    for kind in (
        "cpu",
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA GH200 480GB",
        "Tesla T4",
        "TPU v3",
        "TPU v4 lite",
    ):
        assert chip_of(kind) is None, kind
    assert chip_of("TPU v5p").name == "v5p"
    assert chip_of("TPU v5e").name == "v5e"
    assert chip_of("NVIDIA A100-PCIE-40GB").name == "a100-40"
    assert chip_of("NVIDIA A100 80GB PCIe") is None
