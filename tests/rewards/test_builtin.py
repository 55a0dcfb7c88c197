# SPDX-License-Identifier: Apache-2.0
"""The reward functions that come along, on answers that a model could give."""

import pytest

from qwen2_jax.errors import UserError
from qwen2_jax.rewards import RewardFunction, Scorer, builtin
from qwen2_jax.rewards.sandbox import execute


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        ("The sum is 68.", "68", 1.0),
        ("23 + 45 = 68", 68, 1.0),
        ("23 + 45 = 68", "45", 0.0),
        ("68, which is 23 + 45", "68", 0.0),  # the last number counts
        ("23-45 = -22", "-22", 1.0),
        ("It is 23-45", "45", 1.0),  # a minus between numbers is no sign
        ("so:-7", -7, 1.0),
        ("about 1,234,567.50 dollars", "1234567.5", 1.0),
        ("7.0", 7, 1.0),
        ("0.1", 0.1, 1.0),
        ("0.30000000000000004", "0.3", 0.0),
        ("1234", "1,234", 1.0),
        ("12,34", "34", 1.0),  # not a number with thousands
        ("no idea", "0", 0.0),
        ("", "0", 0.0),
        ("9" * 5000, "9", 0.0),
    ],
)
def test_number(text, answer, score):
    assert builtin.number([text], answer=[answer]) == [score]


def test_number_wants_a_number():
    with pytest.raises(ValueError, match="answer 'seven' contains no number"):
        builtin.number(["7", "7"], answer=["7", "seven"])
    with pytest.raises(UserError, match="needs the column 'answer', and the data has solution"):
        builtin.number(["7"], solution=["7"])
    assert builtin.number(["7"], solution=["7"], column="solution") == [1.0]


def test_format_is_of_the_whole_text():
    pattern = r"<think>.*</think>\d+"
    assert builtin.format(["<think>a\nb</think>7", "<think>a</think>7 ", "x<think></think>7"], pattern=pattern) == [
        1,
        0,
        0,
    ]


def test_length_falls_over_the_last_tokens():
    """DAPO eq. 13 with L_max 20 and L_cache 5."""
    got = builtin.length([[0] * n for n in (0, 15, 16, 18, 20, 21, 100)], most=20, soft=5)
    assert got == [0.0, 0.0, -0.2, -0.6, -1.0, -1.0, -1.0]


@pytest.fixture
def maths():
    pytest.importorskip("math_verify", reason="pip install 'qwen2-jax[rewards]'")
    return builtin.maths


@pytest.mark.parametrize(
    ("text", "answer", "score"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$", "0.5", 1.0),
        (r"so \boxed{0.5}", r"\frac{1}{2}", 1.0),
        (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
        (r"\boxed{(x+1)^2}", "x^2+2x+1", 1.0),
        (r"\boxed{x=7}", "7", 1.0),
        (r"first \boxed{3}, no: \boxed{7}", "7", 1.0),  # the last one, not all as a set
        (r"first \boxed{7}, no: \boxed{3}", "7", 0.0),
        (r"\boxed{8}", "7", 0.0),
        ("The final answer is $7$.", r"\boxed{7}", 1.0),
        ("7", "7", 0.0),  # not strictly given as an answer
        (r"\boxed{7", "7", 0.0),
        (r"\boxed{}", "7", 0.0),
        ("", "7", 0.0),
    ],
)
def test_maths(maths, text, answer, score):
    assert maths([text], answer=[answer]) == [score]


def test_maths_takes_the_last_number_if_not_strict(maths):
    assert maths(["It is 5, or 7", "seven"], answer=["7", "7"], strict=False) == [1.0, 0.0]
    with pytest.raises(ValueError, match="answer '' cannot be read as mathematics"):
        maths(["7"], answer=[""])


def test_maths_in_a_worker(maths):
    """Its alarms need the main thread of a process; what takes for ever to compare is wrong, not fatal."""
    endless = r"\boxed{9^{9^{9^{9}}}}"
    with Scorer([RewardFunction(function="maths")], 1) as score:
        got = score(["Q"] * 3, [r"\boxed{1}", endless, r"\boxed{2}"], answer=["1", "2", "2"])
    assert got.totals == [1.0, 0.0, 1.0]


def test_maths_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "math_verify", None)
    with pytest.raises(UserError, match=r"pip install 'qwen2-jax\[rewards\]'"):
        builtin.maths(["7"], answer=["7"])


ANSWER = "Here it is:\n```python\ndef double(x):\n    return {body}\n```\nThat doubles."


@pytest.fixture
def walls():
    try:
        execute.run("")
    except UserError as why:
        pytest.skip(str(why))


def test_code_passes_its_tests(walls):
    texts = [ANSWER.format(body="2 * x"), ANSWER.format(body="x ** 2"), "def double(x): return 2 * x"]
    tests = ["assert double(3) == 6", ["assert double(2) == 4", "assert double(3) == 6"], "assert double(3) == 6"]
    assert builtin.code(texts, tests=tests, seconds=30.0) == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="tests is empty"):
        builtin.code(texts, tests=[[], [], []])


def test_code_prints_what_it_should(walls):
    text = "```python\nn = int(input())\nprint(n * 2)\nprint()\n```"
    cases = [{"input": "3\n", "output": "6"}, {"input": "5", "output": "10\n"}]
    wrong = [{"input": "3\n", "output": "9"}]
    assert builtin.code([text, text], tests=[cases, cases + wrong], seconds=30.0) == [1.0, 0.0]


def test_code_that_nobody_can_shut_in_stops_the_run_always(monkeypatch):
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(UserError, match="no sandbox .* can be created here.*unsandboxed"):
        builtin.code([ANSWER.format(body="x")], tests=["assert True"])
    assert builtin.code([ANSWER.format(body="x")], tests=["assert True"], seconds=30.0, unsandboxed=True) == [1.0]


def test_builtins_by_name():
    form = RewardFunction(function="format", weight=0.5, options={"pattern": r"\d+"})
    with Scorer([RewardFunction(function="number"), form], 1) as score:
        got = score(["What is 2 + 3?", "What is 2 + 2?"], ["5", "It is 4"], answer=["5", "4"])
    assert got.totals == [1.5, 1.0]
    assert {"rewards/number/mean", "rewards/format/std"} <= set(got.metrics)
