# SPDX-License-Identifier: Apache-2.0
"""Mutated files for the fuzz tests: from a seed, so that a failure is had again by its number.

def test_mutated_configs(mutations):  # a fixture: the seeds of this run, as many as --mutations says
    for seed in mutations:
        data = mutated_json(seed, GOOD)
        right_or_refused(seed, lambda: read(data))
"""

import copy
import functools
import json
import random
import resource
import time
from collections.abc import Callable
from typing import Any

from qwen2_jax.errors import UserError

SECONDS = 10.0  # of processor time, which a busy machine does not lengthen: nothing takes longer to read or to refuse
BYTES = 2**30  # nor grows the process by more

# What files in the wild, and hostile ones, hold where something else is meant.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**15, 2**31 - 1, 2**31, 2**40, 2**63, 2**64, 10**30, -(2**31), 10**400,
    0.0, -0.0, 0.5, 1.5, -1.0, 1e-300, 1e300, 1e308, float("inf"), float("-inf"), float("nan"),
    "", "x", "7", "null", "..", "../../x", "/etc/passwd", "a/b", "\0", "\ud800", "\u00e9", "%s{}{{", "x" * 9_000, "\n",
    [], [None], [0], [1, 2], ["x"], [[]], [-1], [2**40], [1.5], {}, {"": 0}, {"x": None}, {"x": {"x": []}},
)  # fmt: skip


def mutated(seed: int, value: Any) -> Any:
    """A copy of a JSON value with one to three places changed: replaced, removed, doubled, renamed or nested."""
    draw = random.Random(seed)
    value = json.loads(json.dumps(value))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        parents = [item for item in _containers(value) if item]
        if not parents or draw.random() < 0.03:
            value = copy.deepcopy(draw.choice(VALUES))
            continue
        parent = draw.choice(parents)
        key = draw.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        match draw.choice(("replace",) * 6 + ("remove", "rename", "repeat", "nest")):
            case "replace":
                parent[key] = copy.deepcopy(draw.choice(VALUES))  # what is put in may be changed next
            case "remove":
                del parent[key]
            case "rename" if isinstance(parent, dict):
                parent[draw.choice(("x", "", key + "_", key.upper()))] = parent.pop(key)
            case "repeat" if isinstance(parent, list):
                parent.extend([parent[key]] * draw.choice((1, 2, 50)))
            case _:
                parent[key] = draw.choice(({"x": parent[key]}, [parent[key]]))
    return value


def mutated_json(seed: int, value: Any) -> bytes:
    """The bytes of a mutated JSON file; every eighth seed also damages the bytes."""
    content = json.dumps(mutated(seed, value)).encode()
    return damaged(seed, content) if seed % 8 == 7 else content


def damaged(seed: int, content: bytes) -> bytes:
    """A file with bytes cut off, changed, put in or nested without end."""
    draw = random.Random(seed)
    at = draw.randrange(len(content) + 1)
    match draw.choice(("cut", "change", "insert", "deep", "empty", "swap")):
        case "cut":
            return content[:at]
        case "change":
            return content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        case "insert":
            return content[:at] + draw.choice((b"\xff\xfe", b"\0", b"\xe9", b"}", b'"', b"\xef\xbb\xbf")) + content[at:]
        case "deep":
            return content[:at] + draw.choice((b"[", b'{"a":')) * 100_000 + content[at:]
        case "empty":
            return b""
        case _:
            return content[at:] + content[:at]


def _containers(value: Any):
    if isinstance(value, dict | list):
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _containers(item)


def declare_once(monkeypatch: Any, *modules: Any) -> None:
    """Mutations share what one config declares: tracing that takes longer than reading a damaged file.

    modules: those whose `declare` is called.
    """
    for module in modules:
        monkeypatch.setattr(module, "declare", functools.lru_cache(maxsize=64)(module.declare))


def right_or_refused(seed: int, use: Callable[[], Any]) -> Any:
    """use()'s result, or the UserError that it raised with one line of text; anything else fails.

    So does a use that takes longer than SECONDS or makes the process grow by more than BYTES.
    """
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, took = _outcome(seed, use)
    if took >= SECONDS:  # a virtual machine that stood still counts as well; twice, it does not
        outcome, took = _outcome(seed, use)
    assert took < SECONDS, f"mutation {seed} took {took:.1f} s"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) * 1024
    assert grown < BYTES, f"mutation {seed} grew by {grown / 2**20:.0f} MiB"
    return outcome


def _outcome(seed: int, use: Callable[[], Any]) -> tuple[Any, float]:
    """(the result or the refusal, seconds of processor time)."""
    began = time.process_time()
    try:
        outcome = use()
    except UserError as refusal:
        outcome = refusal
        text = str(refusal)
        assert text and "\n" not in text and len(text) < 20_000, f"mutation {seed}: no line to print: {text[:300]!r}"
        text.encode()  # it can be printed
    except Exception as error:
        raise AssertionError(f"mutation {seed} ended in {type(error).__name__}") from error
    return outcome, time.process_time() - began
