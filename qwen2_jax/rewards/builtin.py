# SPDX-License-Identifier: Apache-2.0
"""Built-in reward functions, selected by name: RewardFunction(function="number"). `options` are their keywords."""

import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from qwen2_jax.errors import UserError
from qwen2_jax.rewards.sandbox import execute

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")  # the minus in 23-45 is not a sign
FENCED = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def number(completions: Sequence[str], *, column: str = "answer", **columns: Sequence[Any]) -> list[float]:
    """1 where the last number of the text equals the column's, exactly (7, 7.0 and "7" are one number), else 0."""
    right = [_last_number(str(value)) for value in _column(columns, column)]
    if None in right:
        raise ValueError(f"{column} {_column(columns, column)[right.index(None)]!r} contains no number")
    return [float(_last_number(text) == value) for text, value in zip(completions, right, strict=True)]


def maths(
    completions: Sequence[str], *, column: str = "answer", strict: bool = True, **columns: Sequence[Any]
) -> list[float]:
    r"""1 where the answer equals the column's mathematically (1/2, 0.5 and \frac12 are equal), else 0, by math-verify.

    The answer is the last \boxed{...}, or else LaTeX in $...$, or else, unless `strict`, the last number. Needs the
    extra "rewards". Its time limits (5 s for parsing, 5 s for comparing) use signals, so it must run in the main
    thread, as it does in a worker.
    """
    try:
        from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
    except ImportError as missing:
        raise UserError(f"reward maths: {missing}; pip install 'qwen2-jax[rewards]' brings math-verify") from missing
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it logs the whole answer on a timeout
    latex = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
    targets = [latex] if strict else [latex, ExprExtractionConfig()]
    scores = []
    for text, value in zip(completions, _column(columns, column), strict=True):
        gold = parse(_last_boxed(str(value)) or rf"\boxed{{{value}}}", [latex], fallback_mode="no_fallback")
        if not gold:
            raise ValueError(f"{column} {value!r} cannot be read as mathematics")
        answer = parse(_last_boxed(text) or text, targets, fallback_mode="no_fallback")
        scores.append(float(verify(gold, answer)))  # in this order: x = 7 is a correct answer to 7, not the reverse
    return scores


def format(completions: Sequence[str], *, pattern: str) -> list[float]:
    """1 where the whole text matches the regular expression (`.` also matches line ends), else 0."""
    form = re.compile(pattern, re.DOTALL)
    return [float(form.fullmatch(text) is not None) for text in completions]


def length(completion_ids: Sequence[Sequence[int]], *, most: int, soft: int) -> list[float]:
    """0 up to `most` - `soft` tokens, then falling to -1 at `most`, -1 beyond: DAPO (arXiv:2503.14476, eq. 13)."""
    return [max(-1.0, min(0.0, (most - soft - len(ids)) / soft)) for ids in completion_ids]


def code(
    completions: Sequence[str], *, column: str = "tests", seconds: float = 5.0, memory: int = 2**30,
    unsandboxed: bool = False, **columns: Sequence[Any],
) -> list[float]:  # fmt: skip
    """1 where the Python program in the text's last fenced block passes all its tests, else 0.

    tests: a program with asserts that runs after the answer, a list of such programs, or a list of
    {"input": text, "output": text}: the program reads the input from stdin and must print the output (trailing white
    space of lines and of the text is ignored). seconds of wall time and bytes of memory limit one execution. Asserts
    run in the answer's process, which could tamper with them; printed output is compared outside.

    Programs run in the sandbox (sandbox/execute.py). Raises UserError if it cannot isolate them.
    """
    limits = execute.Limits(seconds=seconds, memory=memory)
    scores = []
    for text, tests in zip(completions, _column(columns, column), strict=True):
        blocks = FENCED.findall(text)
        tests = [tests] if isinstance(tests, str) else tests
        if not tests:
            raise ValueError(f"{column} is empty")
        asserts = [test for test in tests if isinstance(test, str)]
        cases = [test for test in tests if not isinstance(test, str)]
        scores.append(
            float(
                bool(blocks)
                and (not asserts or execute.passes(blocks[-1], "\n".join(asserts), limits, unsandboxed=unsandboxed))
                and all(_prints(blocks[-1], case, limits, unsandboxed) for case in cases)
            )
        )
    return scores


def _prints(program: str, case: dict[str, str], limits: execute.Limits, unsandboxed: bool) -> bool:
    ran = execute.run(program, case["input"], limits, unsandboxed=unsandboxed)
    return ran.exit_code == 0 and _lines(ran.output) == _lines(case["output"])


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _column(columns: dict[str, Sequence[Any]], name: str) -> Sequence[Any]:
    if name not in columns:
        raise UserError(f"the reward needs the column {name!r}, and the data has {', '.join(columns)}: give `column`")
    return columns[name]


def _last_number(text: str) -> Decimal | None:
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def _last_boxed(text: str) -> str:
    r"""The last \boxed{...} with balanced braces, or an empty string; math-verify would combine all of them."""
    start = text.rfind(r"\boxed{")
    depth = 0
    for at in range(max(start, 0), len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0) if text[at - 1] != "\\" else 0
        if text[at] == "}" and depth == 0 and start >= 0:
            return text[start : at + 1]
    return ""
