# SPDX-License-Identifier: Apache-2.0
"""Metrics: strict lines that survive a kill, honest clocks, numbers that add up, and what a person sees."""

import io
import json
import math
import re
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from qwen2_jax.kernels.chip_limits import CHIPS
from rich.console import Console

from few import MANY
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.errors import UserError
from qwen2_jax.observe import Goodput, Logging, Recorder, display, lines, memory
from qwen2_jax.observe import recorder as recording
from qwen2_jax.parallel import chips

TOTAL = 12


def quiet(**options) -> Console:
    return Console(file=io.StringIO(), **options)


def batch_of(step: int) -> Batch:
    tokens = np.arange(8, dtype=np.int32).reshape(2, 4) + step
    segments = np.array([[0, 0, 1, 1], [0, 0, 0, -1]], np.int32)
    return Batch(tokens, tokens + 1, np.ones((2, 4), np.float32), segments, tokens)


def metrics_of(step: int, **more) -> dict:
    """What a step gives; targets differ, so that a mean of means is not the mean."""
    loss, targets = 1.0 / step, 1.0 + step % 3
    ratios = {"loss": (loss * targets, targets), "accuracy": (1.0, targets)}
    known = {"loss": loss, "targets": targets, "tokens": 7, "ratios": ratios, "learning_rate": step * 1e-3}
    return jax.tree.map(jnp.asarray, known | more)


def train(out: Path, *, start=0, stop=TOTAL, state=None, save_at=None, every=4, console=None, **config):
    """Steps start + 1 .. stop; returns (state saved at `save_at`, lines in the file)."""
    saved = None
    config = Logging(every=every, batch_digest=True, **config)
    cost = lambda lengths: int(sum(lengths)) * 100
    with Recorder(config, out, total=TOTAL, cost=cost, console=console or quiet()) as recorder:
        recorder.start(start, state)
        for done in range(start + 1, stop + 1):
            recorder.step(done, metrics_of(done), batch_of(done))
            if done == save_at:
                saved = json.loads(json.dumps(recorder.state()))  # the checkpoint keeps JSON
    return saved, lines.read(out / "metrics.jsonl")


MEASURED = {"seconds", "tokens_per_second", "seconds_per_step", "data_share", "goodput", "time", "programs"}


def steady(found: list[dict]) -> list[dict]:
    """The lines without what a clock or the machine says."""
    without = lambda line: {k: v for k, v in line.items() if k not in MEASURED and not k.startswith("memory")}
    return [without(line) for line in found if "resumed" not in line]


# metrics.jsonl


def test_a_line_sums_up_its_steps(tmp_path):
    found = train(tmp_path)[1]
    assert [line["step"] for line in found] == [4, 8, 12]
    first = found[0]
    targets = [2, 3, 1, 2]  # of the steps 1 to 4
    assert first["loss"] == pytest.approx(sum(t / s for s, t in enumerate(targets, 1)) / sum(targets))
    assert (first["targets"], first["accuracy"], first["tokens"]) == (8, 4 / 8, 28)
    assert first["learning_rate"] == pytest.approx(4e-3)
    assert first["flops"] == 4 * 7 * 100  # padding costs nothing
    assert found[-1]["tokens"] == 7 * TOTAL
    assert len({digest for line in found for digest in line["batches"]}) == TOTAL


@pytest.mark.parametrize("save_at", [4, 6])
def test_a_resumed_run_writes_the_same_lines(tmp_path, save_at):
    """Also when the checkpoint lies inside a line (6), and when the killed run left half a line."""
    whole = train(tmp_path / "whole")[1]
    out = tmp_path / "killed"
    saved = train(out, stop=9, save_at=save_at)[0]
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    found = train(out, start=save_at, state=saved)[1]
    assert steady(found) == steady(whole)
    assert (out / "metrics.jsonl").read_text().endswith("\n")
    seconds = [line["seconds"] for line in found]
    assert seconds == sorted(seconds)


def test_killed_before_the_first_checkpoint(tmp_path):
    train(tmp_path, stop=9)
    assert steady(train(tmp_path)[1]) == steady(train(tmp_path / "whole")[1])


def test_starting_over_forgets_the_run_before(tmp_path):
    train(tmp_path, stop=9)
    with Recorder(Logging(), tmp_path, total=TOTAL, console=quiet()) as recorder:
        recorder.start_over()
        recorder.start(0)
        assert recorder.goodput.seconds["lost"] == 0
    assert lines.read(tmp_path / "metrics.jsonl") == []


def test_every_line_is_strict_json(tmp_path):
    with Recorder(Logging(every=1), tmp_path, total=3, console=quiet()) as recorder:
        recorder.start(0)
        for done, bad in enumerate((math.nan, math.inf, 1.0), 1):
            bad_loss = {"loss": bad, "ratios": {"loss": (bad, 1.0)}}
            recorder.step(done, metrics_of(done, **bad_loss, gradient_norm=bad, load=jnp.array([bad, 1.0])))
        recorder.evaluation(3, {"books": {"loss": jnp.float32(math.nan), "accuracy": 0.5}})
    refuse = lambda constant: pytest.fail(constant)
    texts = (tmp_path / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(text, parse_constant=refuse) for text in texts]
    assert [line.get("loss", "-") for line in found] == [None, None, 1.0, "-"]
    assert found[0]["load"] == [None, 1.0]
    assert found[3]["held_out"] == {"books": {"loss": None, "accuracy": 0.5}}


def test_a_step_that_is_not_finite_leaves_the_means_alone():
    each = [(2.0, 1.0), (math.nan, 5.0), (4.0, 3.0)]  # loss, targets
    steps = [{"loss": loss, "targets": n, "ratios": {"loss": (loss * n, n), "accuracy": (1.0, n)}} for loss, n in each]
    assert recording.reduce(steps) == {"loss": 3.5, "targets": 9.0, "accuracy": 2 / 4}


class Device:
    """Runs one thing after the other, a second each, on a clock of its own that only waiting moves."""

    def __init__(self):
        self.now = self.free = 0.0

    def run(self) -> "Device.Value":
        self.free = max(self.free, self.now) + 1.0
        return Device.Value(self)

    class Value:
        def __init__(self, device):
            self.device, self.done = device, device.free

        def block_until_ready(self) -> None:
            self.device.now = max(self.device.now, self.done)

        def is_ready(self) -> bool:
            return self.device.now >= self.done

        def tolist(self) -> float:
            return self.done


@pytest.mark.parametrize("every", [1, 2])
def test_speed_is_that_of_the_device_also_beside_an_evaluation(tmp_path, every):
    """70 tokens in a second: the first line and those before and after an evaluation all say so."""
    device = Device()
    with Recorder(Logging(every=every), tmp_path, total=6, console=quiet()) as recorder:
        recorder.goodput = Goodput(lambda: device.now)
        recorder.start(0)
        for done in range(1, 7):
            with recorder.goodput("step"):
                value = device.run()
            recorder.step(done, {"done": value, "loss": 1.0, "tokens": 70})
            if done == 4:
                recorder.flush()
                with recorder.goodput("evaluation"):
                    device.run().block_until_ready()
                recorder.evaluation(done, {})
    found = [line for line in lines.read(tmp_path / "metrics.jsonl") if "loss" in line]
    assert [line["tokens_per_second"] for line in found] == [70] * (6 // every)
    assert (recorder.goodput.seconds["step"], recorder.goodput.seconds["evaluation"]) == (6, 1)


@MANY
@given(st.lists(st.tuples(st.floats(0, 10), st.integers(1, 50)), min_size=1, max_size=9), st.integers(1, 8))
def test_lines_may_be_cut_anywhere(steps, cut):
    """The mean of a line is the one of its steps, so cutting a run into other lines changes no total."""
    entries = [{"loss": loss, "targets": n, "ratios": {"loss": (loss * n, n)}} for loss, n in steps]
    parts = [recording.reduce(part) for part in (entries[:cut], entries[cut:]) if part]
    whole = recording.reduce(entries)
    assert sum(p["loss"] * p["targets"] for p in parts) == pytest.approx(whole["loss"] * whole["targets"])


def test_the_loop_is_one_step_ahead_and_no_more(tmp_path):
    """Values of a line are read when the next step is running; a loop that ran further ahead would time itself."""

    class Result:
        def __init__(self, log, step):
            self.log, self.step = log, step

        def block_until_ready(self):
            self.log.append(("wait", self.step))

        def __array__(self, dtype=None, copy=None):
            self.log.append(("fetch", self.step))
            return np.asarray(1.0, dtype)

    log: list = []
    with Recorder(Logging(every=2), tmp_path, total=8, console=quiet()) as recorder:
        recorder.start(0)
        for done in range(1, 5):
            log.append(("run", done))
            recorder.step(done, {"loss": Result(log, done)})
    assert log[:4] == [("run", 1), ("run", 2), ("wait", 1), ("run", 3)]
    assert log.index(("wait", 2)) < log.index(("fetch", 2))
    assert log.index(("run", 3)) < log.index(("fetch", 1))


def test_digests_tell_batches_apart():
    one, two = batch_of(1), batch_of(1)
    assert recording.digest(one) == recording.digest(two)
    two.weights_BT[0, 0] = 0
    assert recording.digest(one) != recording.digest(two)


# Clocks


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Pending:
    def __init__(self, ready):
        self.ready = ready

    def is_ready(self):
        return self.ready


def test_phases_add_up_to_the_time_that_passed():
    clock = Clock()
    goodput = Goodput(clock)
    clock.now = 1
    with goodput("evaluation"):
        clock.now = 3
        with goodput("data"):
            clock.now = 8
        clock.now = 9
    with goodput("step"):
        clock.now = 19
    assert goodput.total() == 19
    assert {k: v for k, v in goodput.seconds.items() if v} == {"other": 1, "evaluation": 3, "data": 5, "step": 10}
    assert goodput.share() == 10 / 19
    with pytest.raises(UserError, match="phase is 'nap'"), goodput("nap"):
        pass


def test_a_wait_hidden_behind_a_step_is_no_wait():
    clock = Clock()
    goodput = Goodput(clock)
    for ready, seconds in ((False, 3), (True, 4)):
        with goodput("data", behind=Pending(ready)):
            clock.now += seconds
    assert (goodput.seconds["step"], goodput.seconds["data"]) == (3, 4)


def test_compiling_is_told_from_computing():
    goodput = Goodput()
    step = jax.jit(lambda x: jnp.sin(x) + 3)
    x = jnp.ones(3)
    for _ in range(2):
        with goodput("step"):
            step(x).block_until_ready()
    assert goodput.seconds["compile"] > goodput.seconds["step"] > 0


def test_lost_time_is_counted_once_however_often_a_run_is_killed(tmp_path):
    """A checkpoint at 10 s, killed at 14 s, again at 13 s, in each case seen from the lines."""
    state = {"tokens": 7, "seconds": {"step": 8.0, "other": 2.0}, "since_line": {}, "waiting": []}
    path = tmp_path / "metrics.jsonl"

    def resumed():
        with Recorder(Logging(), tmp_path, total=9, console=quiet()) as recorder:
            recorder.start(1, state)
            return recorder.goodput.state(), lines.read(path)

    path.write_text('{"step": 1, "seconds": 9.5}\n{"step": 3, "seconds": 14.0}\n')
    first, found = resumed()
    assert first["lost"] == pytest.approx(4.0)
    assert [line["step"] for line in found] == [1, 1]
    with path.open("a") as file:
        file.write(json.dumps({"step": 2, "seconds": found[-1]["seconds"] + 3}) + "\n")
    second, _ = resumed()
    assert 7.0 <= second["lost"] < 7.5
    assert (second["step"], round(second["other"])) == (8.0, 2)


# What a person sees


def test_plain_lines_where_there_is_no_terminal(tmp_path):
    console = quiet(width=200)
    train(tmp_path, console=console)
    shown = console.file.getvalue()
    assert re.search(r"^step 4/12  loss 0\.5417  lr 4\.00e-03  .* tokens/s  data wait 0\.0%  0 s left", shown)
    assert "\x1b" not in shown
    assert shown.count("\n") == 3


def test_a_bar_on_a_terminal(tmp_path):
    console = quiet(force_terminal=True, width=100, color_system=None)
    train(tmp_path, console=console)
    shown = console.file.getvalue()
    assert "12/12" in shown and "100%" in shown and "loss 0.09" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


def test_a_failed_run_gives_the_terminal_back(tmp_path):
    console = quiet(force_terminal=True, width=100)

    def fail():
        with Recorder(Logging(), tmp_path, total=3, console=console) as recorder:
            recorder.start(0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert "\x1b[?25h" in console.file.getvalue()


def test_durations():
    seconds = (9, 130, 3700, 3 * 24 * 3600)
    assert [display.duration(s) for s in seconds] == ["9 s", "2 min", "1 h 02 min", "3.0 days"]


# Other places


def test_tensorboard_hides_what_is_done_again(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto import event_pb2

    saved = train(tmp_path, stop=9, save_at=4, tensorboard=True)[0]
    train(tmp_path, start=4, state=saved, tensorboard=True)
    files = sorted((tmp_path / "tensorboard").iterdir())
    assert len(files) == 2
    events = []
    for file in files:
        data, at = file.read_bytes(), 0
        while at < len(data):  # length, its checksum, the event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 16 + size
    assert {event.step for event in events if "loss" in [value.tag for value in event.summary.value]} == {4, 8, 12}
    assert [event.step for event in events if event.HasField("session_log")] == [1, 5]


def test_weights_and_biases_goes_on_with_its_run(tmp_path, monkeypatch):
    runs = []

    class Run(types.SimpleNamespace):
        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ("*", "step")

        def log(self, values):
            self.logged.append(values)

        def finish(self):
            self.finished = True

    def init(**arguments):
        runs.append(Run(arguments=arguments, logged=[], finished=False))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, __spec__="installed"))
    saved = train(tmp_path, stop=5, save_at=4, wandb="tests")[0]
    train(tmp_path, start=4, state=saved, wandb="tests")
    assert runs[0].arguments["id"] == runs[1].arguments["id"]
    assert [values["step"] for run in runs for values in run.logged] == [4, 8, 12]
    assert any(name.startswith("time/") for name in runs[1].logged[0])  # nested values have a name too
    assert all(run.finished for run in runs)


@pytest.mark.parametrize(("module", "option"), [("wandb", {"wandb": "x"}), ("tensorboardX", {"tensorboard": True})])
def test_what_is_not_installed_is_told(tmp_path, monkeypatch, module, option):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=f"pip install {module}"):
        train(tmp_path, **option)


def test_profile_of_a_window(tmp_path):
    train(tmp_path, stop=4, profile=(2, 3))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


@pytest.mark.parametrize("option", [{"every": 0}, {"wandb": ""}, {"profile": (0, 3)}, {"profile": (5, 4)}])
def test_settings_that_mean_nothing_are_refused(option):
    with pytest.raises(UserError, match=f"{next(iter(option))}"):
        Logging(**option)


def test_memory():
    block = np.ones(2**24)
    found = memory()
    assert 0.125 < found["memory_gib"] <= found["memory_peak_gib"] < 2**10
    del block
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 2**30, "peak_bytes_in_use": 3 * 2**30})
    fuller = types.SimpleNamespace(memory_stats=lambda: {"bytes_in_use": 2**31})
    assert memory([device, fuller]) == {"memory_gib": 2.0, "memory_peak_gib": 3.0}


# Peaks


def test_every_roofline_has_its_peaks():
    assert all(chip.tflops and chip.gb_s for chip in CHIPS.values())
    assert (CHIPS["v7x"].tflops, CHIPS["v7x"].gb_s) == (2307, 7380)  # of both its devices


def test_names_that_begin_alike():
    names = ("TPU v5e", "TPU v5p", "NVIDIA H100 PCIe", "NVIDIA H100 80GB HBM3", "Tesla T4", "NVIDIA L40S", "NVIDIA L4")
    assert [chips.peak_of(name).tflops for name in names] == [197, 459, 756, 989, 65, 362, 121]
    assert chips.peak_of("cpu") is None


def test_utilisation_is_a_share_of_the_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, "peak_of", lambda kind: chips.Peak("", 1e-6, 1))  # a million FLOPs a second
    line = train(tmp_path)[1][-1]
    assert line["mfu"] == pytest.approx(line["flops"] / (line["seconds_per_step"] * 4) / 1e6)
