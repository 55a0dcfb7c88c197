# SPDX-License-Identifier: Apache-2.0
"""Tests run on the CPU wherever they run; the compilers of other devices are asked by name (ahead_of_time.py).

Most of their time is compiling. Programs are therefore compiled without LLVM's optimizations (a program here runs a few
times; `all_optimizations` is for tests of what users run), and kept in a folder that all workers of this run share with
the processes that they start. JAX_DISABLE_MOST_OPTIMIZATIONS=false and JAX_COMPILATION_CACHE_DIR decide otherwise.
"""

import gc
import hashlib
import math
import os
import shutil
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A simulated GPU kernel runs each of its warpgroups in a thread of jax's CPU client, which has one per core: on two
# cores three of them would wait for each other for ever.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # the first process makes it; its workers inherit the variable
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix=f"qwen2-jax-programs-{os.getpid()}-")

import jax
import pytest

from worker import Worker

BEGAN = time.monotonic()
MAPPINGS = 15_000  # Linux allows 65,530; a module adds some thousands


def pytest_addoption(parser):
    parser.addoption("--seconds", type=float, help="tests that have not begun after so many seconds are skipped")
    parser.addoption("--order", metavar="SEED", help="tests in an order drawn from this text, each worker the same one")
    parser.addoption("--mutations", type=int, default=200, help="seeded mutations of each fuzzed input (default 200)")


@pytest.fixture
def mutations(request):
    """The seeds of the mutations that a fuzz test tries (mutations.py)."""
    return range(request.config.getoption("mutations"))


def pytest_collection_modifyitems(config, items):
    """So that those that `--seconds` has time for are others at every commit."""
    seed = config.getoption("order")
    if seed is not None:
        items.sort(key=lambda item: hashlib.sha256(f"{seed} {item.nodeid}".encode()).digest())


def pytest_collection_finish():
    """What is there before the first test stays: no collection of garbage need look at it again, nor so often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def pytest_runtest_setup(item):
    seconds = item.config.getoption("seconds")
    if seconds is not None and time.monotonic() - BEGAN > seconds:
        pytest.skip(f"not begun within {seconds:.0f} s: {item.nodeid}")


def pytest_unconfigure():
    """Ends the folder of programs with the process that made it."""
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    if f"qwen2-jax-programs-{os.getpid()}-" in folder:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_a_module(request):
    """Thousands of compiled programs in one process are more memory mappings than Linux gives it, and XLA crashes.

    Those of tests/kernels end always: some of these tests change the constants that a kernel is traced with.
    """
    yield
    if request.path.parent.name == "kernels" or mappings() > MAPPINGS:
        jax.clear_caches()
        gc.collect()


def mappings() -> float:
    """Of this process's memory; where the system does not say, more than any number."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return math.inf


@pytest.fixture(scope="session")
def eight():
    """A process with eight devices, for all tests that ask it (worker.py)."""
    with Worker(devices=8) as worker:
        yield worker


@pytest.fixture
def all_optimizations():
    """What is compiled in this test is compiled as for users."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
