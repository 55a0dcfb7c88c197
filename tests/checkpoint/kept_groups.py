# SPDX-License-Identifier: Apache-2.0
"""Compares a quantised checkpoint that stays in its groups with its dequantised weights."""

import numpy as np

from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.formats.names import get, hf_names, unrolled
from qwen2_jax.weights.int4_groups import Groups
from qwen2_jax.weights.params import leaves


def groups_are_the_weights(path) -> int:
    """Every weight whose file has groups is kept as it is by dtype="int4"; returns how many tensors these are."""
    opened = checkpoint.open_checkpoint(path)
    kept, wide = (checkpoint.load_params(path, dtype=dtype, unroll=True) for dtype in ("int4", "float32"))
    count = 0
    for where, spec in leaves(unrolled(opened.specs)):
        names = hf_names(spec, 0 if spec.layers else None)
        layouts = [opened.tensors.infos[name].groups for name in names]
        if None in layouts:
            continue
        weight, want = get(kept, where), np.asarray(get(wide, where))
        assert isinstance(weight, Groups), where
        assert weight.values.dtype == ("int4" if all(layout.bits == 4 for layout in layouts) else "int8")
        # An offset is rounded once more, by up to half an ulp of eight scales: that is of the largest weights.
        np.testing.assert_allclose(weight.dequantize(), want, rtol=0, atol=2.0**-23 * np.abs(want).max())
        count += len(names)
    return count
