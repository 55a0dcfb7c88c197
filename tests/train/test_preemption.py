# SPDX-License-Identifier: Apache-2.0
"""SIGTERM and Ctrl-C ask for a last checkpoint: one process, and one of two, which then stop after the same step."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

import tiny
from qwen2_jax import checkpoint
from qwen2_jax.train.state.checkpoints import Checkpointing, Checkpoints
from qwen2_jax.train.state.preemption import Preemption
from small_run import config_file


def test_sigterm_is_a_request():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("outer"))
    try:
        with Preemption() as preemption:
            assert not preemption.requested(1)
            for _ in range(2):  # the second comes while the state is being saved
                signal.raise_signal(signal.SIGTERM)
            assert preemption.requested(2) and preemption.requested(3)
            assert heard == []
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["outer"], "the handler before was not put back"
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def ctrl_c():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, if a shell started this in background
    yield
    signal.signal(signal.SIGINT, before)


def test_the_first_ctrl_c_is_a_request_and_the_second_an_interrupt(ctrl_c, capfd):
    with Preemption() as preemption:
        assert not preemption.requested(1)
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested(2)
        assert capfd.readouterr().err.count("Ctrl-C again stops at once") == 1
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with Preemption() as preemption:  # as at first
        signal.raise_signal(signal.SIGINT)
        assert preemption.requested(1)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ignored_interrupts_stay_ignored(ctrl_c):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert not preemption.requested(1)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_interrupted_command_says_what_continues(tmp_path, monkeypatch, capsys, corpus):
    import train

    monkeypatch.setattr("qwen2_jax.train.recipes.run", lambda *_, **__: signal.default_int_handler(2, None))
    file = str(config_file(corpus, tmp_path, "steps=9"))
    saved = tmp_path / "out" / "checkpoints"
    for flags, folder, said in (
        ([], None, "no checkpoint was written yet, so the same command starts from the beginning"),
        ([], "7.orbax-checkpoint-tmp", "no checkpoint was written yet, so the same command starts from the beginning"),
        ([], "53", "the same command continues after step 53, the last one that was saved"),
        (["--no-resume"], "53", "the same command without --no-resume continues after step 53, the last"),
    ):
        if folder:
            (saved / folder).mkdir(parents=True, exist_ok=True)
        assert train.main([file, *flags]) == 130
        assert f"stopped; {said}" in capsys.readouterr().err


PROCESS = """
import os, signal, sys, time
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from rich.console import Console
from qwen2_jax.parallel.sharding import make_mesh
from qwen2_jax.train.state.checkpoints import Checkpointing, Checkpoints
from qwen2_jax.train.state.preemption import Preemption

mesh = make_mesh(fsdp=2)
where = {"w": NamedSharding(mesh, P("fsdp")), "n": NamedSharding(mesh, P())}
state = jax.jit(lambda: {"w": jnp.zeros((8, 8)), "n": jnp.int32(0)}, out_shardings=where)()
step = jax.jit(lambda s: {"w": s["w"] + 0.5, "n": s["n"] + 1}, donate_argnums=0)
config = Checkpointing(every_steps=None, every_minutes=0.0)
with Checkpoints(sys.argv[3], config, identity={}, console=Console(stderr=True)) as run, Preemption() as preemption:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    found = run.restore(like)
    first, state = (found.step, found.state) if found else (0, state)
    for n in range(first + 1, first + 1000):
        state = step(state)
        if run.due(n):
            run.save(n, state)
        if n == first + 14 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if preemption.requested(n):
            run.save(n, state)
            break
        time.sleep(0.01)
print(first, n, int(state["n"]), float(state["w"].addressable_data(0).sum()))

# An export of weights whose parts both processes hold: each writes its share of the tensors.
import tiny
from qwen2_jax import checkpoint
from qwen2_jax.parallel import sharding
from qwen2_jax.model import declare
from qwen2_jax.weights.params import leaves
from qwen2_jax.checkpoint.formats.names import get, nested
model = tiny.CONFIGS["dense"]
specs, params = declare(model)[1], tiny.random_params(model)
def spread(path, spec):
    whole, place = np.asarray(get(params, path)), sharding.sharding(spec.axes, spec.shape, mesh)
    return jax.make_array_from_callback(spec.shape, place, lambda index: whole[index])
tree = nested({path: spread(path, spec) for path, spec in leaves(specs)})
assert not tree["embed_VD"].is_fully_addressable
for _ in range(2):
    checkpoint.save_hf(sys.argv[3] + "-hf", model, tree, dtype="bfloat16", replace=True)
"""


def both_processes(folder) -> list[list[float]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", PROCESS, address]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen([*command, str(rank), str(folder)], env=environment, **pipes) for rank in (0, 1)]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, stderr) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, stderr[-3000:]
    return [[float(x) for x in stdout.splitlines()[-1].split()] for stdout, _ in outputs]


@pytest.mark.slow  # quick: test_hosts.py
def test_two_processes_stop_after_the_same_step_and_continue(tmp_path):
    """Only one hears the signal. Both save; both continue there; one process alone can read what two have written.

    What they then export is what one process exports, byte for byte.
    """
    before = 0.0
    folder = tmp_path / "checkpoints"
    for _ in range(2):
        (first, last, count, total), other = both_processes(folder)
        assert other == [first, last, count, total]
        assert first == before and first + 14 <= last < first + 1000
        assert count == last and total == 32 * 0.5 * last
        before = last
    like = {"w": np.zeros((8, 8), np.float32), "n": np.int32(0)}
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), like)
    with Checkpoints(folder, Checkpointing(), identity={}, console=Console(stderr=True)) as run:
        found = run.restore(like)
    assert found.step == before and bool(jnp.all(found.state["w"] == 0.5 * before))
    model = tiny.CONFIGS["dense"]
    checkpoint.save_hf(tmp_path / "one", model, tiny.random_params(model, dtype=jnp.bfloat16))
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "checkpoints-hf" / path.name).read_bytes() == path.read_bytes()
