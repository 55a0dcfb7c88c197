# SPDX-License-Identifier: Apache-2.0
"""Reward functions that do everything wrong: the run stops with prompt and reason, or goes on, and nothing is lost."""

import contextlib
import dataclasses
import math
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tyro

from few import slow
from qwen2_jax.errors import UserError
from qwen2_jax.rewards import RewardFunction, Scorer, shaped, weighted

HERE = str(Path(__file__).with_name("functions.py"))
WRONG = {  # what a text of functions.misbehaves does, and what is said of it
    "raise": r"LookupError: no such word \(functions.py line \d+\)",
    "exit": "SystemExit: 3",
    "die": r"its process exited \(exit code 7\)",
    "hang": "it took longer than 2 s and was killed",
    "count": "it returned 2 values for 1 completions",
    "none": "it returned None, not a list of 1 numbers",
    "text": "it returned '0', not a list of 1 numbers",
    "nan": "it returned nan, which is not a finite number",
    "inf": "it returned -inf, which is not a finite number",
    "word": "it returned '3', which is not a finite number",
    "large": r"it returned 1e\+39, which is not a finite number of float32",
    "digits": "it returned 1000.*, which is not a finite number of float32",
    "list": r"it returned \[3\], which is not a finite number",
}


def reward(name: str, **settings) -> RewardFunction:
    return RewardFunction(function=f"{HERE}:{name}", **settings)


def asked(*texts: str) -> list[list[dict[str, str]]]:
    system = {"role": "system", "content": "Be kind."}
    return [[system, {"role": "user", "content": f"Q{n}"}] for n in range(len(texts))]


def scores(rewards: list[RewardFunction], *texts: str, workers: int = 1, **columns):
    with Scorer(rewards, workers) as scorer:
        return scorer(asked(*texts), texts, **columns)


@pytest.fixture(scope="module")
def skipping():
    """One worker for many tests: it has to survive all of them."""
    with Scorer([reward("misbehaves", on_error="skip", timeout=2.0), reward("length", weight=0.5)], 1) as scorer:
        yield scorer


@pytest.fixture(scope="module")
def stopping():
    with Scorer([reward("misbehaves", timeout=2.0)], 1) as scorer:
        yield scorer


def test_weights_and_missing_scores():
    got = scores([reward("length", weight=2.0), reward("even", weight=-1.0)], "ab", "abc", workers=2)
    assert got.by_name == {"length": [2.0, 3.0], "even": [1.0, None]}
    assert got.totals == [3.0, 6.0]
    assert got.metrics["rewards/length/mean"] == 2.5
    assert got.metrics["rewards/length/std"] == pytest.approx(math.sqrt(0.5), abs=1e-15)  # ddof 1
    assert got.metrics["rewards/even/mean"] == 1.0 and got.metrics["rewards/even/failed"] == 0
    only = scores([reward("even")], "a", "abc")
    assert only.totals == [None, None] and "rewards/even/mean" not in only.metrics


def test_columns_and_options():
    ids = [np.arange(3), np.arange(5)]
    got = scores([reward("echo", options={"scale": 10.0})], "a", "b", answer=np.array([1, 2]), completion_ids=ids)
    assert got.totals == [40.0, 70.0]
    with pytest.raises(UserError, match="needs ground_truth, .* it can have prompts, completions, answer"):
        scores([reward("needs_more")], "a", answer=["1"])
    with pytest.raises(UserError, match="2 completions; of other length: answer"):
        scores([reward("length")], "a", "b", answer=["1"])
    with pytest.raises(UserError, match="get values that JSON has, not <object object at .*> of type object"):
        scores([reward("length")], "a", answer=[object()])


def test_arrays_are_lists_of_numbers():
    assert scores([reward("as_array")], "a", "bc").totals == [1.0, 2.0]


def test_nothing_to_score():
    assert scores([reward("length")]).totals == []


@pytest.mark.parametrize("what", WRONG)
def test_stop_names_function_prompt_and_reason(stopping, what):
    texts = ("good", what, "good")
    with pytest.raises(UserError, match=f"misbehaves on the prompt 'Q1' and the answer '{what}': {WRONG[what]}"):
        stopping(asked(*texts), texts)


@pytest.mark.parametrize("what", [what if what != "hang" else slow(what)[0] for what in WRONG])  # quick: hangs, below
def test_skip_goes_on_and_loses_nothing(skipping, what):
    texts = ("good", what, "better")
    got = skipping(asked(*texts), texts)
    assert got.by_name["misbehaves"] == [1.0, None, 1.0]
    assert got.totals == [3.0, len(what) / 2, 4.0]
    assert got.metrics["rewards/misbehaves/failed"] == 1
    assert len(got.failures) == 1 and "'Q1'" in got.failures[0]


def test_a_function_that_always_hangs_does_not_hold_up_the_run_for_ever():
    start = time.monotonic()
    got = scores([reward("misbehaves", on_error="skip", timeout=0.5)], *["hang"] * 20, "good")
    assert got.totals == [None] * 21 and got.metrics["rewards/misbehaves/failed"] == 21
    assert "is no longer called after 3 consecutive timeouts" in got.failures[-1]
    assert time.monotonic() - start < 30


def test_a_call_that_is_only_slow_is_made_in_pieces():
    """Four completions of 0.6 s are too many for one call of 2.2 s, and nothing is wrong with any of them."""
    assert scores([reward("slow", timeout=2.2, options={"seconds": 0.6})], *"abcd").totals == [0.6] * 4


def test_single_completions_that_hang_cost_no_others():
    texts = ["hang", "good", "hang", "good", "hang", "good", "hang", "good"]
    got = scores([reward("misbehaves", on_error="skip", timeout=1.0, batch=1)], *texts)
    assert got.totals == [None, 1.0] * 4


def test_a_hanging_function_ends_with_what_it_started():
    mark = f"left{time.time_ns()}"
    hanging = reward("misbehaves", on_error="skip", timeout=2.0, options={"scratch": mark})
    assert scores([hanging], "hang").totals == [None]
    wait_until(lambda: not running(mark))


def test_a_wrong_count_that_shows_only_together():
    with pytest.raises(UserError, match="'Q0'.*returned 1 values for 2 .*it does not fail on each of them alone"):
        scores([reward("together")], "a", "a")
    assert scores([reward("together", on_error="skip")], "a", "a").totals == [1.0, 1.0]


def test_calls_are_spread_over_workers():
    one = scores([reward("process")], *"abcdef", workers=2).totals
    many = scores([reward("process", batch=1)], *"abcdef", workers=2).totals
    assert len({*one}) == 1 and os.getpid() not in one
    assert len({*many}) == 2
    assert scores([reward("length", batch=2)], "a", "bb", "ccc", workers=2).totals == [1.0, 2.0, 3.0]


def test_workers_end_with_the_scorer():
    scorer = Scorer([reward("process", batch=1)], 2)
    processes = {int(total) for total in scorer(asked(*"abcdef"), "abcdef").totals}
    scorer.close()
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    with pytest.raises(RuntimeError):  # of the threads: there is nobody to ask
        scorer(asked("a"), ["a"])


def test_a_worker_that_the_system_killed_is_replaced():
    with Scorer([reward("process")], 1) as scorer:
        (first,) = scorer(["Q"], ["a"]).totals
        os.kill(int(first), signal.SIGKILL)
        time.sleep(0.2)
        (second,) = scorer(["Q"], ["a"]).totals
    assert first != second


def test_workers_end_when_the_training_is_killed(tmp_path):
    """In the middle of a call that would take five minutes."""
    mark = f"left{time.time_ns()}"
    program = f"""
from qwen2_jax.rewards import RewardFunction, Scorer
misbehaves = RewardFunction(function={HERE + ":misbehaves"!r}, options={{"scratch": {mark!r}}}, timeout=300.0)
with Scorer([misbehaves], 1) as scorer:
    scorer(["Q"], ["hang"])
"""
    training = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path)
    wait_until(lambda: running(mark))
    training.kill()
    training.wait()
    wait_until(lambda: not running(mark))


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(mark: str) -> bool:
    """Whether a process was started with the text in its command line, other than a test's program."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_text())
    return any(f"# {mark}" in line for line in found)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ("nowhere.py:f", "no file '/.*nowhere.py'"),
        (f"{HERE}:nothing", "defines no function 'nothing'"),
        ("qwen2_jax.nowhere:f", "cannot be loaded: ModuleNotFoundError: No module named 'qwen2_jax.nowhere'"),
    ],
)
def test_functions_that_cannot_be_loaded(function, said):
    with pytest.raises(UserError, match=said):
        Scorer([RewardFunction(function=function)], 1)


def test_a_file_that_cannot_be_executed(tmp_path):
    (tmp_path / "broken.py").write_text("def f(completions):\n    return 1\n\nf(")
    with pytest.raises(UserError, match=r"broken.py:f cannot be loaded: .*SyntaxError"):
        Scorer([RewardFunction(function=f"{tmp_path}/broken.py:f")], 1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"function": "nubmer"}, "give one of number, maths"),
        ({"function": "file.py:"}, "give one of number"),
        ({"function": 3}, "neither a function nor"),
        ({"function": "number", "timeout": -1.0}, "timeout is -1.0"),
        ({"function": "number", "batch": 0}, "batch is 0"),
        ({"function": "number", "on_error": "zero"}, "supported: 'stop', 'skip'"),
    ],
)
def test_settings_that_make_no_sense(settings, said):
    with pytest.raises(UserError, match=said):
        RewardFunction(**settings)


def test_two_of_one_name():
    with pytest.raises(UserError, match=r"\['length', 'length'\]"):
        Scorer([reward("length"), reward("length")])
    with pytest.raises(UserError, match="1 worker or more"):
        Scorer([reward("length")], 0)


def test_function_objects(tmp_path, monkeypatch):
    """Those that a process can find run in a worker; the others run here, which is said."""
    (tmp_path / "my_rewards_module.py").write_text(Path(HERE).read_text())
    (tmp_path / "a_config.py").write_text(
        "import os\nfrom qwen2_jax.rewards import RewardFunction\n\n\n"
        "def mine(completions):\n    return [os.getpid()] * len(completions)\n\n\n"
        "config = RewardFunction(function=mine)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import my_rewards_module

    imported = RewardFunction(function=my_rewards_module.process)
    configured = runpy.run_path(str(tmp_path / "a_config.py"))["config"]
    judge = RewardFunction(function=my_rewards_module.judge, name="judge")
    here = RewardFunction(function=lambda completions: [os.getpid()] * len(completions), name="here")
    assert imported.reference == "my_rewards_module:process"
    assert configured.reference == f"{tmp_path}/a_config.py:mine"
    assert judge.reference is None and here.reference is None
    with Scorer([imported, configured, judge, here], 1) as scorer:
        got = scorer(["Q"], ["a"]).by_name
        assert [note.split()[1] for note in scorer.notes] == ["judge", "here"]
    assert got["process"] == got["mine"] != [os.getpid()]
    assert got["judge"] == [2.0] and got["here"] == [os.getpid()]


def test_a_function_in_this_process_may_fail_too():
    def fails(completions):
        raise ValueError("no")

    with pytest.raises(UserError, match=r"on the prompt 'Q' .*ValueError: no \(test_scorer.py line \d+\)"):
        Scorer([RewardFunction(function=fails)])(["Q"], ["a"])
    got = Scorer([RewardFunction(function=fails, on_error="skip")])(["Q", "R"], ["a", "b"])
    assert got.totals == [None, None] and len(got.failures) == 2


def test_the_command_line_of_a_config_with_rewards():
    given = (reward("length", weight=2.0), RewardFunction(function=reward))
    fields = [("rewards", tuple[RewardFunction, ...], given), ("seed", int, 0)]
    config = dataclasses.make_dataclass("Config", fields, frozen=True)
    got = tyro.cli(config, default=config(), args=["--seed", "3"], config=(tyro.conf.AvoidSubcommands,))
    assert got.rewards == given and got.seed == 3


def test_shaped_reward_of_qwen2_math():
    """Worked numbers of sigmoid(r_m / 2) + (r_v - 1)."""
    got = shaped([2.0, -1.0, 3.0, 0.0], [1.0, 1.0, 0.0, 0.0])
    np.testing.assert_allclose(got, [0.73105858, 0.37754067, -0.18242552, -0.5], atol=5e-9, rtol=0)
    assert shaped([None, 1.0], [1.0, None]) == [None, None]
    assert shaped([1e6, -1e6], [0.0, 1.0]) == [0.0, 0.0]


def test_weighted_sums():
    assert weighted([[1.0, None], [0.5, None]], [1.0, 2.0]) == [2.0, None]
    with pytest.raises(ValueError):
        weighted([[1.0]], [1.0, 2.0])
