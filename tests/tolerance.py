# SPDX-License-Identifier: Apache-2.0
"""How close is close enough: as close as plain code in the same dtype, by a factor. Never a number tuned to pass."""

import jax
import numpy as np

BFLOAT16 = 2.0**-8  # a floor: what rounding a result once to bfloat16 may cost


def assert_no_worse(got, naive, exact, *, factor=2.0, floor=1e-5):
    """`got` may err at most `factor` times as much as plain code in the same dtype, both measured against `exact`.

    `floor`, in units of the largest exact value (or 1), is what float32 may differ by where plain code is exact.
    Returns the largest error as a share of what is allowed.
    """
    got, naive, exact = (np.asarray(x, np.float32) for x in (got, naive, exact))
    assert got.shape == exact.shape, f"shape {got.shape} instead of {exact.shape}"
    finite = np.isfinite(exact)
    assert np.isfinite(got[finite]).all(), "not finite where the exact result is"
    np.testing.assert_array_equal(got[~finite], exact[~finite])
    if not finite.any():
        return 0.0
    error, allowed = (np.abs(x[finite] - exact[finite]).max() for x in (got, naive))
    allowed = factor * allowed + floor * max(1.0, np.abs(exact[finite]).max())
    assert error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}"
    return float(error / allowed)


def assert_no_worse_at_random(got, naive, exact):
    """`assert_no_worse` for bfloat16 results of random examples: on average, and 4 times for the worst number alone.

    Of a few thousand examples of attention one had a number 3.8 times as wrong as plain code's worst, where the root of
    the mean square error was 1.2 times plain code's.
    """
    assert_no_worse(got, naive, exact, factor=4.0, floor=BFLOAT16)
    finite = np.isfinite(np.asarray(exact, np.float32))
    got, naive, exact = (np.asarray(x, np.float64)[finite] for x in (got, naive, exact))
    if finite.any():
        error, allowed = (np.sqrt(np.square(x - exact).mean()) for x in (got, naive))
        allowed = 2 * allowed + BFLOAT16 / 8 * max(1.0, np.sqrt(np.square(exact).mean()))  # of inputs of about 1
        assert error <= allowed, f"root mean square error {error:.2e}, allowed {allowed:.2e}"


def close(got, want, units=32, what=""):
    """Equal but for the order of float32 sums, in other shapes of the same work: the largest difference is at most so
    many units in the last place of the largest value wanted, or of 1. Most places need 1 to 16; who needs more says so.
    """
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    assert got.shape == want.shape, f"{what} shape {got.shape} instead of {want.shape}"
    error = np.abs(got - want).max(initial=0.0) / (2.0**-23 * max(1.0, np.abs(want).max(initial=0.0)))
    assert error <= units, f"{what} {error:.1f} units in the last place, allowed {units}"


def in_float64(function, *args):
    """The exact results for `assert_no_worse`: function(*args) in float64, every float32 array of `args` widened."""
    with jax.enable_x64(True):
        widen = lambda x: np.asarray(x, np.float64) if np.asarray(x).dtype == np.float32 else np.asarray(x)
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.tree.map(widen, args)))
