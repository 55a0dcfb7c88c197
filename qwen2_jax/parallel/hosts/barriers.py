# SPDX-License-Identifier: Apache-2.0
"""Meeting and comparing, with a time limit and an error that names who is missing.

Where several processes work, all of them make the same calls in the same order. They need jax.distributed, however it
was started, and no devices.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Mapping

from qwen2_jax.parallel.hosts.group import HostError, client_and_place, processes_named

PREFIX = "qwen2_jax/"
_turn = itertools.count()  # makes names of meetings unique; the same everywhere, as the calls are


@dataclasses.dataclass(frozen=True)
class Difference:
    """A fact that is not the same everywhere: its values with the processes that have them, most common first."""

    fact: str
    values: tuple[tuple[str, tuple[int, ...]], ...]


def barrier(name: str, *, seconds: float = 600) -> None:
    """Returns when every process is here. Raises HostError that names those which did not come in time."""
    client, process, processes = client_and_place()
    if client is None:
        return
    key = f"{PREFIX}{next(_turn)}/{name}"
    client.key_value_set(f"{key}/{process}", "")
    try:
        client.wait_at_barrier(f"{key}/met", int(1000 * seconds))
    except RuntimeError as why:
        came = {int(k.rpartition("/")[2]) for k, _ in client.key_value_dir_get(f"{key}/")}
        absent = [i for i in range(processes) if i not in came]
        if not absent:
            raise HostError(f"the processes did not meet ({name}): {why}") from why
        raise _absent(absent, name, seconds) from why


def differences(name: str, facts: Mapping[str, str], *, seconds: float = 120) -> list[Difference]:
    """The facts that are not equal on all processes, the same list on each; empty where one process works alone.

    Raises HostError, on every process that came, that names those which did not come in time.
    """
    client, process, processes = client_and_place()
    if client is None:
        return []
    key = f"{PREFIX}{next(_turn)}/{name}"
    client.key_value_set(f"{key}/said/{process}", json.dumps(dict(facts)))
    if process == 0:
        said = _all_said(client, f"{key}/said/", processes, seconds)
        absent = [i for i in range(processes) if i not in said]
        found = [] if absent else _compare([said[i] for i in range(processes)])
        client.key_value_set(f"{key}/found", json.dumps([absent, [(d.fact, d.values) for d in found]]))
    try:
        absent, found_json = json.loads(client.blocking_key_value_get(f"{key}/found", int(1000 * (seconds + 10))))
    except RuntimeError as why:
        raise _absent([0], name, seconds) from why
    if absent:
        raise _absent(absent, name, seconds)
    return [Difference(fact, tuple((value, tuple(who)) for value, who in values)) for fact, values in found_json]


def _absent(processes: list[int], name: str, seconds: float) -> HostError:
    return HostError(
        f"{processes_named(processes)} did not come to the meeting '{name}' within {seconds:.0f} s; look at their "
        "output for what they are doing instead"
    )


def _all_said(client, prefix: str, processes: int, seconds: float) -> dict[int, dict[str, str]]:
    end, pause = time.monotonic() + seconds, 0.02
    while True:
        said = client.key_value_dir_get(prefix)
        if len(said) == processes or time.monotonic() > end:
            return {int(key.rpartition("/")[2]): json.loads(value) for key, value in said}
        time.sleep(pause)
        pause = min(2.0, 1.2 * pause)


def _compare(said: list[dict[str, str]]) -> list[Difference]:
    found = []
    for fact in dict.fromkeys(itertools.chain.from_iterable(said)):
        values: dict[str, list[int]] = {}
        for process, facts in enumerate(said):
            values.setdefault(facts.get(fact, "absent"), []).append(process)
        if len(values) > 1:
            common = sorted(values.items(), key=lambda item: -len(item[1]))  # stable: of equals that of process 0
            found.append(Difference(fact, tuple((value, tuple(who)) for value, who in common)))
    return found
