# SPDX-License-Identifier: Apache-2.0
"""Products with integers in groups, by every implementation that runs here, against the definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qwen2_jax.kernels.weight_only_matmul import IMPLEMENTATIONS, reference, weight_only_matmul, xla

from integer_cases import drawn, exact
from tolerance import BFLOAT16, assert_no_worse

FORMS = {"cpu": xla._in_blocks, "by group": xla._by_group, "dequantised": xla._dequantised}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("values", [jnp.int4, jnp.int8])
@pytest.mark.parametrize("offset", [False, True])
def test_every_form_is_the_definition(form, rows, values, offset, monkeypatch):
    monkeypatch.setattr(xla, "BLOCK", 7 * 96)  # so that the last block reaches back
    parts = drawn(40, 96, 3, values, offset=offset)
    for dtype in (jnp.float32, jnp.bfloat16):
        x = jax.random.normal(jax.random.key(1), (rows, 96), dtype)
        plain = reference.weight_only_matmul(x, *parts, dtype=jnp.float32)
        if dtype == jnp.bfloat16 and form == "dequantised":  # the weight is rounded to the dtype of x
            plain = x @ reference.dequantised(*parts).astype(dtype).T
        assert_no_worse(jax.jit(FORMS[form])(x, *parts), plain, exact(x, *parts))


@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name in ("xla", "reference")])
def test_the_gradient_of_x_and_none_of_the_weight(name):
    parts = drawn(24, 64, 2)
    x = jax.random.normal(jax.random.key(1), (3, 64))
    dy = jax.random.normal(jax.random.key(2), (3, 24))
    y, pull = jax.vjp(lambda x: weight_only_matmul(x, *parts, implementation=name), x)
    want = np.asarray(dy, np.float64) @ np.asarray(reference.dequantised(*parts), np.float64)
    plain = dy @ reference.dequantised(*parts)
    assert_no_worse(pull(dy)[0], plain, want)
    assert y.dtype == x.dtype


def test_the_result_has_the_dtype_that_is_asked_for():
    parts = drawn(8, 32, 1)
    x = jnp.ones((2, 32), jnp.bfloat16)
    wide = weight_only_matmul(x, *parts, dtype=jnp.float32)
    narrow = weight_only_matmul(x, *parts)
    assert (wide.dtype, narrow.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_allclose(narrow.astype(jnp.float32), wide, rtol=BFLOAT16)


def test_shapes_that_do_not_fit():
    q, scale, offset = drawn(8, 32, 4)
    x = jnp.ones((2, 32))
    for arguments, message in (
        ((x[:, :16], q, scale, offset), "must fit"),
        ((x, q, scale[:, :3], None), "must fit"),
        ((x, q, scale, offset[:, :2]), "offset must have the shape"),
        ((x, q.astype(jnp.int32), scale, offset), "int4 or int8"),
    ):
        with pytest.raises(ValueError, match=message):
            weight_only_matmul(*arguments)
