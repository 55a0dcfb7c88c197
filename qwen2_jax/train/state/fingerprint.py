# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of device arrays: 64 bits per array, computed on the devices, the same for every sharding.

A checkpoint keeps the fingerprints of the state in memory. What is restored must have the same ones, so a bit that
changed anywhere (in memory, on its way, on the disk) is seen, on any mesh, without reading the files again.

The fingerprint is two sums mod 2**32 of one term per element,

    term = scramble(bits of the element ^ p),    p = sum over dimensions d of index_d * ODD_d

* Sums mod 2**32 are exact in any order: devices add up their own shards, then each other's sums.
* Any change of a single element is detected with certainty: for a fixed position every operation of the term can be
  undone (xor; a shift xored back in; a product with an odd number, which has an inverse mod 2**32; with an even one the
  top bits would fall out). So other bits give another term, and as no other term changed, another sum.
* The order counts because the position goes into the term before it is scrambled. A plain sum of bits times odd weights
  would miss two flipped signs: 2**31 * w is 2**31 for every odd w, and twice that is 0.
* Changes of several elements cancel out in both sums with a probability of about 2**-64.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

_POSITIONS = (  # a row per sum, an odd number per dimension: 32 bits of square roots of primes, the last bit set
    (0x6A09E667, 0xBB67AE85, 0x3C6EF373, 0xA54FF53B, 0x510E527F, 0x9B05688D, 0x1F83D9AB, 0x5BE0CD19),
    (0xCBBB9D5D, 0x629A292B, 0x9159015B, 0x152FECD9, 0x67332667, 0x8EB44A87, 0xDB0C2E0D, 0x47B5481D),
)
_SCRAMBLES = ((0x85EBCA6B, 0xC2B2AE35), (0x7FEB352D, 0x846CA68B))  # odd multipliers: MurmurHash3's, lowbias32's


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by names such as "params/embed/weight_VD", in the tree's order."""
    found = jax.tree.leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in found}
    if len(leaves) < len(found):
        raise ValueError("two leaves of the tree have the same name")
    return leaves


def fingerprints(tree: Any) -> dict[str, str]:
    """16 hexadecimal digits for each leaf of a pytree of arrays. One compiled program; nothing is gathered."""
    leaves = named(tree)
    sums = jax.device_get(_sums(list(leaves.values())))
    return {name: f"{int(a):08x}{int(b):08x}" for name, (a, b) in zip(leaves, sums, strict=True)}


def digest(tree: Any) -> str:
    """One text for all arrays of a pytree, their names, dtypes and shapes: 16 hexadecimal digits."""
    about = {name: [leaf.dtype.name, list(leaf.shape)] for name, leaf in named(tree).items()}
    text = json.dumps([about, fingerprints(tree)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@jax.jit
def _sums(leaves: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    # Pairs of scalars, not one array: a scalar has no dimension to split, so every host holds it.
    return [_leaf(leaf) for leaf in leaves]


@jax.jit  # leaves of equal shape, such as weights and their moments, are traced once
def _leaf(array: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits = _bits(array)
    first, second = (
        jnp.sum(_scramble(bits ^ _position(bits.shape, odd), *multipliers), dtype=jnp.uint32)
        for odd, multipliers in zip(_POSITIONS, _SCRAMBLES, strict=True)
    )
    return first, second


def _bits(array: jax.Array) -> jax.Array:
    """The bits of every element as uint32; 64-bit elements become two along a new last dimension."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(array)
    if array.dtype == jax.dtypes.float0 or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"arrays of dtype {array.dtype.name} have no fingerprint")
    size = array.dtype.itemsize
    if size < 4 and not jnp.issubdtype(array.dtype, jnp.floating):
        return array.astype(jnp.uint32)  # whole numbers and booleans: different values stay different
    return jax.lax.bitcast_convert_type(array, f"uint{min(8 * size, 32)}").astype(jnp.uint32)


def _position(shape: tuple[int, ...], odd: tuple[int, ...]) -> jax.Array:
    """A number for each position. By dimension, since a row-major index of a large stack of experts exceeds 32 bits."""
    if len(shape) > len(odd):
        raise TypeError(f"arrays of more than {len(odd)} dimensions have no fingerprint")
    position = jnp.zeros(shape, jnp.uint32)
    for dim, factor in enumerate(odd[: len(shape)]):
        position += jax.lax.broadcasted_iota(jnp.uint32, shape, dim) * jnp.uint32(factor)
    return position


def _scramble(x: jax.Array, first: int, second: int) -> jax.Array:
    """A bijection of 32-bit numbers in which each bit of the input flips about half of the output's."""
    x = (x ^ (x >> 16)) * jnp.uint32(first)
    x = (x ^ (x >> 13)) * jnp.uint32(second)
    return x ^ (x >> 16)
