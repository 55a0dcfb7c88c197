# SPDX-License-Identifier: Apache-2.0
"""Several processes, one checkpoint: which process reads and writes what, one shared folder, errors raised in all.

The unit is one array of one layer (all experts of it together). Every unit belongs to one process, which alone holds
all of it and writes it; the split depends only on sizes and the number of processes, so no communication is needed.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from qwen2_jax.checkpoint.formats.names import Slot
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.atomic_folder import new_folder, unfinished

APPEARS_SECONDS = 10.0  # a network disk may show another host's new folder a little later
Unit = tuple[str, ...]  # names of tensors that stay together


def shares(table: Mapping[str, Slot], infos: Mapping[str, TensorInfo], count: int) -> list[list[Unit]]:
    """The units that each of `count` processes writes, about equal in bytes.

    Units are assigned largest first, each to the process with the fewest bytes so far. A single process gets all units
    in the order of `table`.
    """
    names: dict[tuple, list[str]] = {}
    for name, slot in table.items():
        names.setdefault((slot.path, slot.repeat), []).append(name)
    units = [tuple(group) for group in names.values()]
    if count == 1:
        return [units]
    nbytes = {unit: sum(infos[name].nbytes for name in unit) for unit in units}
    dealt: list[list[Unit]] = [[] for _ in range(count)]
    load = [0] * count
    for unit in sorted(units, key=lambda unit: -nbytes[unit]):
        least = load.index(min(load))
        dealt[least].append(unit)
        load[least] += nbytes[unit]
    return dealt


def in_turns(dealt: Sequence[Sequence[Unit]]) -> list[str]:
    """All names in the order that every process follows: the first unit of each process, then the second, ..."""
    rounds = itertools.chain.from_iterable(itertools.zip_longest(*dealt, fillvalue=()))
    return [name for unit in rounds for name in unit]


def by_hosts(shape: Sequence[int]) -> NamedSharding:
    """An array of this shape cut into as many consecutive parts as there are processes, one in the memory of each.

    It is cut in the first dimension that divides; where none does, each process holds all of it and the first writes.
    """
    first_of: dict[int, jax.Device] = {}
    for device in jax.devices():
        first_of.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first_of[p] for p in sorted(first_of)]), ("host",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*cut_by_hosts(shape, len(first_of))))


def cut_by_hosts(shape: Sequence[int], count: int) -> list[str | None]:
    """The partition of `by_hosts`: "host" at the dimension that is cut."""
    cut = next((d for d, size in enumerate(shape) if size % count == 0), None)
    return ["host" if d == cut else None for d in range(len(shape))]


@contextlib.contextmanager
def together(doing: str) -> Iterator[None]:
    """A barrier: the block ends when it has ended in every process. An error in one process is raised in all."""
    if jax.process_count() == 1:
        yield
        return
    problem = None
    try:
        yield
    except Exception as why:  # any kind: the others must not wait for this process forever
        problem = why
        print(f"process {jax.process_index()}: {doing}: {why}; the other processes will stop too", file=sys.stderr)
    failed = multihost_utils.process_allgather(np.array(problem is not None)).reshape(-1)
    if problem is not None:
        raise problem
    if failed.any():
        whose = ", ".join(map(str, np.flatnonzero(failed)))
        raise CheckpointError(f"{doing} failed in process {whose}, see its message")


@contextlib.contextmanager
def shared_folder(path: str | os.PathLike, nbytes: int, *, replace: bool = False) -> Iterator[Path]:
    """`new_folder` for several processes: process 0 makes the folder and renames it, all processes write into it.

    Raises CheckpointError where a process does not see what the first one made: the folder must be on a shared disk.
    """
    if jax.process_count() == 1:
        with new_folder(path, nbytes, replace=replace) as folder:
            yield folder
        return
    with contextlib.ExitStack() as stack:
        with together(f"making {path}"):
            if jax.process_index() == 0:
                folder = stack.enter_context(new_folder(path, nbytes, replace=replace))
            else:
                folder = unfinished(path)
        with together(f"looking for {path}"):
            if not _appears(folder):
                raise CheckpointError(
                    f"process {jax.process_index()} does not see the folder {folder.parent} that process 0 has made; "
                    "all hosts write into one folder: give a path on a disk that all of them mount"
                )
        with together(f"writing {path}"):
            yield folder
        with together(f"completing {path}"):
            stack.close()


def _appears(folder: Path) -> bool:
    until = time.monotonic() + APPEARS_SECONDS
    while not folder.is_dir():
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def exchanged(names: Sequence[str], digests: Mapping[str, str]) -> dict[str, str]:
    """The SHA-256 of every tensor; each process gives those that it computed."""
    if jax.process_count() == 1:
        return {name: digests[name] for name in names}
    table = np.zeros((len(names), 32), np.uint8)
    for row, name in zip(table, names, strict=True):
        if name in digests:
            row[:] = np.frombuffer(bytes.fromhex(digests[name]), np.uint8)
    everyone = multihost_utils.process_allgather(table).max(axis=0)
    return {name: row.tobytes().hex() for row, name in zip(everyone, names, strict=True)}
