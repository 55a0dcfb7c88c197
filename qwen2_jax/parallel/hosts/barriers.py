# SPDX-License-Identifier: Apache-2.0
"""Barriers between processes and comparison of their values, with a time limit and errors that name missing processes.

All processes make the same calls in the same order. They need jax.distributed, however it was started, and no devices.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping

from qwen2_jax.parallel.hosts.group import HostError, client_and_process, processes_named

PREFIX = "qwen2_jax/"
_calls = itertools.count()  # makes keys unique; equal on all processes, as the calls are


@dataclasses.dataclass(frozen=True)
class Difference:
    """A fact that differs between processes: each value with the processes that have it, most common first."""

    fact: str
    values: tuple[tuple[str, tuple[int, ...]], ...]


def barrier(name: str, *, seconds: float = 600) -> None:
    """Returns when every process has called it. Raises HostError that names those that did not within `seconds`."""
    client, process, processes = client_and_process()
    if client is None:
        return
    key = f"{PREFIX}{next(_calls)}/{name}"
    client.key_value_set(f"{key}/{process}", "")
    try:
        client.wait_at_barrier(f"{key}/met", int(1000 * seconds))
    except RuntimeError as error:
        arrived = {int(k.rpartition("/")[2]) for k, _ in client.key_value_dir_get(f"{key}/")}
        absent = [i for i in range(processes) if i not in arrived]
        if not absent:
            raise HostError(f"the barrier '{name}' failed: {error}") from error
        raise _absent(absent, name, seconds) from error


def differences(name: str, facts: Mapping[str, str], *, seconds: float = 120) -> list[Difference]:
    """The facts that differ between processes, the same list on each; empty for a single process.

    Raises HostError, on every process that called it, that names those that did not within `seconds`.
    """
    client, process, processes = client_and_process()
    if client is None:
        return []
    key = f"{PREFIX}{next(_calls)}/{name}"
    client.key_value_set(f"{key}/facts/{process}", json.dumps(dict(facts)))
    if process == 0:
        given = _wait_for_facts(client, f"{key}/facts/", processes, seconds)
        absent = [i for i in range(processes) if i not in given]
        found = [] if absent else _compare([given[i] for i in range(processes)])
        client.key_value_set(f"{key}/found", json.dumps([absent, [(d.fact, d.values) for d in found]]))
    try:
        absent, found_json = json.loads(client.blocking_key_value_get(f"{key}/found", int(1000 * (seconds + 10))))
    except RuntimeError as error:
        raise _absent([0], name, seconds) from error
    if absent:
        raise _absent(absent, name, seconds)
    return [Difference(fact, tuple((value, tuple(who)) for value, who in values)) for fact, values in found_json]


def _absent(processes: list[int], name: str, seconds: float) -> HostError:
    return HostError(
        f"{processes_named(processes)} did not reach the barrier '{name}' within {seconds:.0f} s; look at their output"
    )


def _wait_for_facts(client, prefix: str, processes: int, seconds: float) -> dict[int, dict[str, str]]:
    end, pause = time.monotonic() + seconds, 0.02
    while True:
        given = client.key_value_dir_get(prefix)
        if len(given) == processes or time.monotonic() > end:
            return {int(key.rpartition("/")[2]): json.loads(value) for key, value in given}
        time.sleep(pause)
        pause = min(2.0, 1.2 * pause)


def _compare(given: list[dict[str, str]]) -> list[Difference]:
    found = []
    for fact in dict.fromkeys(itertools.chain.from_iterable(given)):
        values: dict[str, list[int]] = {}
        for process, facts in enumerate(given):
            values.setdefault(facts.get(fact, "absent"), []).append(process)
        if len(values) > 1:
            # Stable: of equally common values, that of process 0 comes first.
            common = sorted(values.items(), key=lambda item: -len(item[1]))
            found.append(Difference(fact, tuple((value, tuple(who)) for value, who in common)))
    return found
