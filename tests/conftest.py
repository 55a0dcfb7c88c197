# SPDX-License-Identifier: Apache-2.0
"""Tests run on the CPU wherever they run; the compilers of other devices are asked by name (ahead_of_time.py).

Most of their time is compiling. Programs are therefore compiled without LLVM's optimizations (a program here runs a few
times), and kept in a folder that all workers of this run and the processes that they start share. What must not be so
asks for it: with_all_optimizations, without_kept_programs. `JAX_DISABLE_MOST_OPTIMIZATIONS=false` in the environment
runs everything as users do, and JAX_COMPILATION_CACHE_DIR keeps the programs for the next run.
"""

import gc
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# A simulated GPU kernel runs each of its warpgroups in a thread of jax's CPU client, which has one per core: on two
# cores three of them would wait for each other for ever.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
MADE = None if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp(prefix="qwen2-jax-programs-")
if MADE is not None:  # by the first process; its workers find it in their environment
    os.environ["JAX_COMPILATION_CACHE_DIR"] = MADE

import jax
import pytest


def pytest_unconfigure():
    if MADE is not None:
        shutil.rmtree(MADE, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_module():
    """Thousands of compiled programs in one process are more memory mappings than Linux gives it, and XLA crashes."""
    yield
    jax.clear_caches()
    gc.collect()
