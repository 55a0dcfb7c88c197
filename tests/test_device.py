# SPDX-License-Identifier: Apache-2.0
"""python -m benchmarks.device, which proves an accelerator, tried on a CPU: what goes wrong costs its own line only."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = {
    ("fault: wrong", "grouped_matmul doubled"): "wrong",
    ("fault: hangs", "never ends"): "hung",
    ("fault: hangs", "right"): "ok",
    ("fault: out of memory", "too much"): "out of memory",
    ("fault: out of memory", "right"): "ok",
    ("fault: crashes", "ends the process"): "crashed",
    ("fault: crashes", "right"): "ok",
}


def device(*arguments):
    command = [sys.executable, "-m", "benchmarks.device", *map(str, arguments)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def cases(folder):
    found = json.loads((folder / "device.json").read_text())
    return found, {(case["piece"], case["case"]): case for case in found["cases"]}


@pytest.mark.slow
def test_what_goes_wrong_is_named_and_the_rest_goes_on(tmp_path):
    ended = device("--small", "--faults", "--only", "fault", "--out", tmp_path)
    assert ended.returncode == 1, ended.stderr
    found, by_case = cases(tmp_path)
    assert {name: case["status"] for name, case in by_case.items()} == FAULTS
    assert found["left out"] == []
    assert "WRONG fault: wrong: grouped_matmul doubled: error" in ended.stdout
    assert "HUNG fault: hangs: never ends: no end after" in ended.stdout
    assert "the process ended with 7" in ended.stdout

    # Again: what was right stays, what was not is tried again.
    ended = device("--small", "--faults", "--only", "fault: crashes", "--out", tmp_path)
    assert re.findall(r"^ +(\w+) +fault: crashes: ([^ ]+)", ended.stdout, re.M) == [("crashed", "ends")]
    again = cases(tmp_path)[1]
    assert {name: case["status"] for name, case in again.items()} == FAULTS
    assert again["fault: crashes", "right"] == by_case["fault: crashes", "right"]

    record = tmp_path / "RESULTS.md"
    assert device("--out", tmp_path, "--publish", record).returncode == 0
    text = record.read_text()
    assert re.match(r"\n## \d{4}-\d\d-\d\d: .*cpu.*, benchmarks.device, tiny shapes\n", text)
    assert "| fault: hangs | 1 | 1 | 0 | - |" in text


def test_no_time_leaves_everything_out_and_says_so(tmp_path):
    ended = device("--small", "--only", "peaks", "--minutes", "0.01", "--out", tmp_path)
    assert ended.returncode == 0, ended.stderr
    assert cases(tmp_path)[0]["left out"] == ["peaks"]
    assert "Left out for time: peaks." in ended.stdout


@pytest.mark.slow
def test_the_whole_command(tmp_path):
    """Every piece at tiny shapes, kernels in their interpreters."""
    ended = device("--small", "--minutes", "8", "--out", tmp_path)
    found, by_case = cases(tmp_path)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert found["left out"] == []
    assert {case["status"] for case in by_case.values()} <= {"ok", "refused", "skipped"}
    refused = {piece for (piece, _), case in by_case.items() if case["status"] != "ok"}
    assert refused <= {"speed beside torch"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "flux"], "--only flux: no piece has that in its name; --list shows them"),
        (["--minutes", "0"], "--minutes 0: give a number above 0"),
        (["--publish", "somewhere.md"], "device.json does not exist: run the command first"),
        ([], "no GPU or TPU here, only a CPU (cpu); --small runs everything on it"),
    ],
)
def test_a_mistake_is_one_line(arguments, says, tmp_path):
    ended = device(*arguments, "--out", tmp_path / "none")
    assert ended.returncode != 0
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr


def test_the_plan_in_the_documentation_is_this_one():
    listed = device("--list").stdout.strip()
    assert listed in (ROOT / "benchmarks" / "README.md").read_text()


def test_it_starts_without_packages_that_it_can_do_without(tmp_path):
    """And without an installation: the machine that has a chip for a few minutes may have jax and little else."""
    missing = ("tyro", "grain", "torch", "tensorboardX", "matplotlib", "pyarrow", "datasets", "hypothesis", "pytest")
    program = f"""
import sys
sys.modules.update(dict.fromkeys({missing!r}))
sys.meta_path[:] = [x for x in sys.meta_path if "editable" not in repr(x)]
from benchmarks.device.worker import find_sources
find_sources()
from benchmarks.device import checks, faults, models, speed, training
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
