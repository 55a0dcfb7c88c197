# SPDX-License-Identifier: Apache-2.0
"""Checks before a job starts that all hosts have the same code, packages, settings and devices.

Processes whose programs differ deadlock in the first collective that differs, or silently compute wrong results.
"""

import hashlib
import importlib.metadata
import itertools
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen2_jax.parallel.hosts.barriers import Difference, differences
from qwen2_jax.parallel.hosts.group import Group, HostError, processes_named

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")
# Variables that may differ between hosts: addresses, process numbers and local paths.
OWN = {
    "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_COORDINATOR_PORT",
    "JAX_LOCAL_DEVICE_IDS", "JAX_NUM_PROCESSES", "JAX_COMPILATION_CACHE_DIR", "JAX_PARTITION_INDEX", "JAX_SLICE_INDEX",
}  # fmt: skip
SHOWN, LONG = 6, 90  # differences in a message, characters of a value


def check(group: Group, settings: Mapping[str, Any], *, seconds: float = 120) -> None:
    """Raises HostError on all hosts that names what differs, on which processes, and the values. Initializes no device.

    settings: of the command, a mapping nested to any depth.
    """
    if group.processes > 1:
        facts = dict(itertools.chain(_code(), _packages(), _variables(), _flat("setting ", settings)))
        _refuse(group, differences("comparing code and settings", facts, seconds=seconds))


def check_devices(group: Group, *, seconds: float = 300) -> None:
    """The same check for the devices of each process; initializes them."""
    if group.processes > 1:
        import jax

        mine = jax.local_devices()
        devices = f"{len(mine)} x {mine[0].device_kind}"
        _refuse(group, differences("comparing devices", {"devices of a process": devices}, seconds=seconds))


def _refuse(group: Group, found: Sequence[Difference]) -> None:
    if found:
        more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise HostError(
            f"hosts disagree: {'; '.join(_described(group, one) for one in found[:SHOWN])}{more}. Give all hosts the "
            "same code, packages, command and number of devices"
        )


def _described(group: Group, one: Difference) -> str:
    shown = []
    for value, who in one.values:
        here = group.named(who[0]) if len(who) == 1 else processes_named(who)
        shown.append(f"{value if len(value) <= LONG else value[:LONG] + '...'} on {here}")
    return f"{one.fact} is {' and '.join(shown[:4])}{', ...' * (len(shown) > 4)}"


def _code() -> Iterator[tuple[str, str]]:
    """A digest of every source file of the package."""
    root = Path(__file__).parents[2]  # qwen2_jax/
    kernels = root / "kernels" if (root / "kernels").is_dir() else root.parent / "kernels"  # beside it in a clone
    for folder in (root, kernels):
        for path in sorted(folder.rglob("*.py")):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
            yield f"file {folder.name}/{path.relative_to(folder).as_posix()}", digest


def _packages() -> Iterator[tuple[str, str]]:
    yield "Python", platform.python_version()
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield name, "not installed"


def _variables() -> Iterator[tuple[str, str]]:
    """The environment variables that change compiled programs."""
    for name, value in os.environ.items():
        if name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS") or (name.startswith("JAX_") and name not in OWN):
            yield f"${name}", " ".join(word for word in value.split() if not word.startswith("--xla_dump"))


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for name, inner in value.items():
            yield from _flat(f"{prefix}{name}.", inner)
    else:
        yield re.sub(r"\.$", "", prefix), str(value)
