# SPDX-License-Identifier: Apache-2.0
"""Saves and restores train state and metadata with Orbax, in the background; detects corruption."""

import contextlib
import gc
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from qwen2_jax.checkpoint.formats.names import nested
from qwen2_jax.train.state.fingerprint import named

CHUNK_BYTES = 32 * 2**20  # pieces of an array on disk: a device of another mesh reads the pieces that its shard touches


class Damaged(Exception):
    """A checkpoint cannot be used, and why."""


def start_saving(folder: Path, state: Any, about: dict[str, Any]) -> Any:
    """Returns when the arrays were copied from the devices; `.result()` of what it returns waits for the disk."""
    with _orbax():
        return ocp.save_checkpointables_async(folder, {"state": _as_dict(state), "about": about})


def load(folder: Path, abstract_state: Any) -> Any:
    """The state, with the shardings of abstract_state. Raises Damaged."""
    problem = None
    with _orbax(), _silent():
        try:
            tree = ocp.load(folder, _as_dict(abstract_state), checkpointable_name="state")
        except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
            raise  # not the checkpoint's fault
        except Exception as why:  # damage shows as anything: ValueError, KeyError, OSError, NotImplementedError
            problem = reason(why)
        if problem is not None:
            gc.collect()  # unfinished reads report their errors now, while their output is hidden
    if problem is not None:
        raise Damaged(f"it cannot be read ({problem})")
    found = named(tree)
    return jax.tree.unflatten(jax.tree.structure(abstract_state), [found[name] for name in named(abstract_state)])


def reason(error: BaseException) -> str:
    """The message of the innermost cause, in one line."""
    while (inner := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = inner
    text = " ".join(str(error).split()).partition(" [tensorstore_spec")[0] or type(error).__name__
    return text if len(text) <= 300 else f"{text[:60]} ... {text[-235:]}"  # the end says what, the beginning which


def _orbax() -> ocp.Context:
    """Orbax's settings: arrays as they are (trained weights do not compress), "about" as JSON and not as a tree."""
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="about")
    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.storage_options.chunk_byte_size = CHUNK_BYTES
    context.checkpointables.registry = registry
    return context


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """When one array cannot be read, Orbax abandons its other reads, which print errors that cannot be caught."""
    loggers, hook = [logging.getLogger(name) for name in ("absl", "asyncio")], sys.unraisablehook
    levels = [logger.level for logger in loggers]
    sys.unraisablehook = lambda _: None
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        sys.unraisablehook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _as_dict(tree: Any) -> dict[str, Any]:
    """Nested dicts of names: the layout on disk does not depend on the containers of optax and jax."""
    return nested({tuple(name.split("/")): leaf for name, leaf in named(tree).items()})
