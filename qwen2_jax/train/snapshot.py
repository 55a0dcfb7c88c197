# SPDX-License-Identifier: Apache-2.0
"""The resumable state of a run in one .npz file, written so that a crash leaves the old or the new one, never half."""

import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen2_jax.errors import UserError


def save(path: Path, state: Any) -> None:
    """Writes every leaf of a pytree of arrays, in the order of jax.tree.flatten_with_path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = {_name(i, keys): np.asarray(leaf) for i, (keys, leaf) in enumerate(jax.tree.leaves_with_path(state))}
    half = path.with_suffix(".partial.npz")
    np.savez(half, allow_pickle=False, **leaves)
    os.replace(half, path)


def restore(path: Path, like: Any) -> Any:
    """Reads what `save` wrote into the structure of `like`. Raises UserError when names, shapes or dtypes differ."""
    expected = {_name(i, keys): leaf for i, (keys, leaf) in enumerate(jax.tree.leaves_with_path(like))}
    with np.load(path, allow_pickle=False) as file:
        found = {name: file[name] for name in file.files}
    differs = set(found) ^ set(expected)
    differs |= {
        n for n, x in found.items() if n in expected and (x.shape, x.dtype) != (expected[n].shape, expected[n].dtype)
    }
    if differs:
        raise UserError(
            f"{path} belongs to another configuration ({len(differs)} arrays differ, first {min(differs)}): "
            "choose another --out, or --no-resume to start over"
        )
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])


def _name(index: int, keys) -> str:
    return f"{index:05d}{jax.tree_util.keystr(keys)}"
