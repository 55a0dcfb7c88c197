# SPDX-License-Identifier: Apache-2.0
"""The launch found from flags, variables and clusters; a single process opens no socket."""

import subprocess
import sys

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.parallel import hosts
from qwen2_jax.parallel.hosts import Flags, Launch

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_NTASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip
MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_VERSION": "4.1.6",
}  # fmt: skip
JAX = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}


@pytest.fixture
def cluster(monkeypatch):
    """Sets the variables of a cluster, and no others that would tell of one."""

    def set_variables(variables):
        for name in {**SLURM, **MPI, **JAX}:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return hosts.find(Flags())

    return set_variables


@pytest.mark.parametrize(
    ("flags", "environ", "wanted"),
    [
        (Flags(), {}, None),
        (Flags(processes=1), JAX, None),
        (Flags("b:2", 2, 1), {}, Launch("b:2", 2, 1)),
        (Flags(), JAX, Launch("a:1", 4, 3)),
        (Flags("b:2", process=0, host_timeout=9), JAX, Launch("b:2", 4, 0, heartbeat=9)),
        (Flags("[::1]:2", 2, 0), {}, Launch("[::1]:2", 2, 0)),
    ],
)
def test_flags_and_variables(flags, environ, wanted):
    assert hosts.find(flags, environ) == wanted


@pytest.mark.parametrize(
    ("flags", "environ", "message"),
    [
        (
            Flags(processes=2),
            {},
            "--processes given, but no --coordinator and no --process, and no cluster was detected",
        ),
        (Flags("b", 2, 0), {}, "HOST:PORT, as in 10.0.0.2:1234"),
        (Flags("b:99999", 2, 0), {}, "port below 65536"),
        (Flags("b:1", 2, 2), {}, "process 2 of 2: --process counts from 0 to 1"),
        (Flags("b:1", 0, 0), {}, "--processes 0: give at least 1"),
        (Flags("b:1", 2, 0, host_timeout=1), {}, "--host-timeout 1: give at least 5"),
        (Flags(), JAX | {"JAX_PROCESS_ID": "x"}, "JAX_PROCESS_ID='x' is not a number"),
    ],
)
def test_what_cannot_be(flags, environ, message):
    with pytest.raises(UserError, match=message):
        hosts.find(flags, environ)


def test_slurm(cluster):
    """A process per GPU has that GPU; a process alone on its node has all of them, which jax would not give it."""
    assert cluster(SLURM) == Launch("node07:61441", 16, 9, (1,), "Slurm")
    alone = SLURM | {
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    }
    assert cluster(alone) == Launch("node07:61441", 2, 1, None, "Slurm")
    assert cluster(SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None
    assert hosts.find(Flags(processes=1)) is None


def test_open_mpi(cluster):
    found = cluster(MPI)
    assert (found.processes, found.process, found.devices, found.how) == (2, 1, None, "Ompi")
    assert found.address.startswith("10.96.0.1:")
    assert cluster(MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2"}).devices == (0,)


def test_a_cluster_that_does_not_say_enough(cluster):
    with pytest.raises(
        UserError, match="looks like Ompi, but cluster detection failed .*: give --coordinator HOST:PORT"
    ):
        cluster(MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;pipe://"})


def test_a_process_alone_does_nothing():
    """In a pod of Kubernetes too, as every notebook there is: no jax, no socket, no thread."""
    program = """
import os, sys, socket, threading
os.environ["KUBERNETES_SERVICE_HOST"] = "10.0.0.1"
sys.modules["libtpu"] = None  # not installed: with it, jax is asked whether there are TPUs
import importlib.util
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "libtpu" else real(name, *rest)
socket.socket = None
from qwen2_jax.parallel import hosts
with hosts.joined(hosts.find(hosts.Flags())) as group:
    hosts.check(group, {})
    hosts.check_devices(group)
    hosts.barrier("nobody else")
    assert hosts.differences("nothing", {"a": "b"}) == []
assert (group.process, group.processes, group.first) == (0, 1, True)
assert "jax" not in sys.modules and threading.active_count() == 1
"""
    clean = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
