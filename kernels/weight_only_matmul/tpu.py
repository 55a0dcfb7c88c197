# SPDX-License-Identifier: Apache-2.0
"""Products with integers in groups for TPU (Pallas, Mosaic): integers are read as they are and widened in fast memory.

Two kernels:

* `_few_kernel`, for a decode step's few rows, reads every integer once and does little else. A block of outputs with
  all their inputs is a step, so that copies are long. Integers are only converted, which is exact; the matrix unit
  makes one sum for each group, and the sums are multiplied by the scales: M numbers instead of g for each group.
  Groups shorter than the 128 inputs that a matrix unit takes at once share one product, of 128 / g copies of x, each
  with zeros outside its own groups. Rows are what such a product has plenty of room for. The weight may be one of a
  stack, chosen at run time for each of several blocks of rows (kernels/grouped_matmul).

      for each block of outputs, for each block of rows:      (outputs shared out among the cores of the chip)
          sums = -(sums of x over groups) offset^T
          for each 128 inputs, or each longer group:
              sums += (copies of x) (integers)^T * scales, of each copy those of its groups

* `_many_kernel` cuts the result in blocks of rows and outputs, and walks over the inputs. A block of the weight is
  dequantised in float32, rounded to x's dtype and multiplied; the sums stay in fast memory.

XLA keeps scales as [G, O] in memory where G numbers would not fill registers, and a kernel that wants them as [O, G]
would have them copied, padded, at every call. So they are taken as they are stored, and turned in fast memory.

M rows, I inputs, O outputs, G groups, g inputs of a group. E weights of a stack, Z blocks of X rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..chip_limits import MIB, chip_of
from ..counts import Count
from ..target import Target, block_sizes, require
from .blocks import BLOCKS
from .gradients import with_gradient

LANES = 128  # width of a register, and inputs that a matrix unit takes at once
MOST_COPIED = 128  # rows of all copies of x for which `_few_kernel` is used
LONGEST = 512  # inputs of a product in `_few_kernel`: longer groups are cut
SUBLANES = 8
STEPS = 8  # of `_few_kernel`, at least, where they are not too short
SHORTEST = 2**18  # bytes of integers in such a step
DEPTH = 512, 6144  # inputs of a block in `_many_kernel`: between these where there is a divisor
PIECE = 256  # outputs that it dequantises at a time
OVER_I = (((1,), (1,)), ((), ()))


def weight_only_matmul(x_MI, values_OI, scale_OG, offset_OG, *, dtype, **blocks):
    """Returns [M, O] in `dtype`. `blocks` replace entries of the table in blocks.py."""
    on = require("tpu")
    (O, I), G = values_OI.shape, scale_OG.shape[1]
    M = math.prod(x_MI.shape[:-1])
    if 0 in (M, O, I):
        raise NotImplementedError(f"needs at least one row, output and input, got {x_MI.shape} and {values_OI.shape}")
    bits = check(x_MI.dtype, I, G, values_OI.dtype)
    cut = choose_cut(on, M, O, I, G, bits, offset_OG is not None, x_MI.dtype, dtype, **blocks)
    static = cut, jnp.dtype(dtype), on.interpret
    return _product(static, x_MI.reshape(M, I), values_OI, scale_OG, offset_OG).reshape(*x_MI.shape[:-1], O)


def check(dtype, I, G, values):
    """Bits of integers of the dtype `values`. Raises NotImplementedError for a weight that is not taken."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"needs x in bfloat16 or float32, got {dtype}")
    if I % LANES:
        raise NotImplementedError(f"needs inputs that are a multiple of {LANES}, got {I}")
    if I // G < 16 or ((I // G) % LANES and LANES % (I // G)):
        raise NotImplementedError(f"needs groups of 16, 32, 64 or a multiple of {LANES} inputs, got {I // G}")
    return 4 if values == jnp.int4 else 8


class Cut(NamedTuple):
    """How the work is cut. All of it is static."""

    few: bool  # which kernel
    rows: int  # of a block
    outputs: int  # of a block
    inputs: int  # of a product
    copies: int  # of x, in `_few_kernel`
    memory: int  # bytes of fast memory that the kernel takes


def choose_cut(on: Target, M, O, I, G, bits, offset, dtype, out_dtype, visits=1, stack=1, **blocks) -> Cut:
    """The largest blocks that the table in blocks.py allows and that fit in fast memory.

    For M rows, or for `visits` blocks of M rows times weights of a stack of so many.
    """
    chip = chip_of(on.kind)
    limit = (chip.fast_bytes if chip else 64 * MIB) * 7 // 10  # the compiler needs some itself
    item, out_item, terms = jnp.dtype(dtype).itemsize, jnp.dtype(out_dtype).itemsize, 1 + offset
    rows, copies, group = _up(M, SUBLANES), max(1, LANES * G // I), I // G
    factors = 4 * _up(G, LANES)  # bytes of the scales of an output, at most
    if rows * copies <= MOST_COPIED:
        inputs = max(LANES, _divisor(group, LONGEST)) if group >= LANES else LANES
        wanted = {**block_sizes(BLOCKS, on, "tpu, few"), **blocks}
        step = min(wanted["step_bytes"], max(SHORTEST, visits * O * I * bits // 8 // STEPS))
        for outputs in _halves(step * 8 // (I * bits), O):
            weights = 2 * outputs * I * bits // 8 + outputs * inputs * 4
            results = rows * outputs * (4 + 2 * out_item + 4 * copies)
            x = 2 * rows * (I * item + offset * factors) + rows * copies * inputs * (4 + item)
            together = min(stack, SUBLANES) if stack > 1 and stored_by_group(stack, G) else 1
            memory = weights + (2 * terms * together + 1) * outputs * factors + results + x
            if memory <= limit:
                return Cut(True, rows, outputs, inputs, copies, memory)
    wanted, inputs = {**block_sizes(BLOCKS, on, "tpu, many"), **blocks}, _depth(I)
    for most in _halves(wanted["rows"], _up(M, 2 * SUBLANES)):
        rows = _up(-(-M // -(-M // most)), 2 * SUBLANES)
        for outputs in _even(O, wanted["outputs"]):
            piece = math.gcd(outputs, PIECE)
            weights = 2 * outputs * inputs * bits // 8 + piece * inputs * (item + 4)
            results = rows * outputs * (4 + 2 * out_item) + rows * piece * 4
            splits = 8 * (rows + piece) * inputs * (item == 4)  # a product of float32 is one of several bfloat16 each
            memory = weights + 3 * terms * outputs * factors + results + 2 * rows * inputs * item + splits
            if memory <= limit:
                return Cut(False, rows, outputs, inputs, 1, memory)
    raise NotImplementedError(f"needs blocks of {inputs} inputs that fit in {limit} bytes of fast memory")


def _up(x, unit):
    return -(-x // unit) * unit


def _halves(most, whole):
    """`whole` if it is no more than `most`, then powers of two of registers' widths that are less than both."""
    powers = [LANES * 2**n for n in reversed(range(12)) if LANES * 2**n <= max(most, LANES)]
    return [*([whole] if whole <= max(most, LANES) else []), *(size for size in powers if size < whole)]


def _even(O, most):
    """Blocks of outputs, the one that costs least first: of padding, and of reading x once more for each block."""
    sizes = [size for size in range(PIECE, most + 1, PIECE) if size < O]
    cut = sorted(sizes, key=lambda size: _up(O, size) * (1 + 64 / size))
    return [O, *cut] if most >= O else cut


def _divisor(I, most):
    """The largest multiple of LANES that divides I, itself one, and is no more than `most`."""
    return max(size for size in range(LANES, most + 1, LANES) if I % size == 0)


def _depth(I):
    """Inputs of a block in `_many_kernel`: the smallest divisor of at least DEPTH[0], or the largest below it."""
    low, high = DEPTH
    sizes = [size for size in range(LANES, min(I, high) + 1, LANES) if I % size == 0]
    return next((size for size in sizes if size >= low), sizes[-1])


def _precision(dtype):
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT


def _dot(x, w, precision):
    return lax.dot_general(x, w, OVER_I, precision=precision, preferred_element_type=jnp.float32)


def _compiler_params(semantics, memory):
    # A quarter more than the buffers that are asked for: products need room on the way.
    return pltpu.CompilerParams(dimension_semantics=semantics, vmem_limit_bytes=memory * 5 // 4 + 2 * MIB)


def _as_stored(s_OG):
    """(whether XLA stores it the other way round, [G, O], the array in that order)."""
    turned = s_OG.shape[-1] % LANES != 0
    return turned, s_OG.swapaxes(-1, -2) if turned else s_OG


def stored_by_group(E, G):
    """Whether XLA stores the scales of a stack, [E, O, G], as [G, E, O]: where it then has less to fill up.

    One weight's are rows of several registers there, which hold those of eight weights.
    """

    def filled(size):
        return _up(size, SUBLANES) if size > 4 else 2 ** (size - 1).bit_length()

    return bool(G % LANES) and filled(E) * G < filled(G) * E


def _factors_spec(turned, outputs, G, block, expert=None):
    """Of all scales of a block of outputs; block(*grid indices) is its number, `expert` that of a stack's weight."""
    shape = (G, outputs) if turned else (outputs, G)

    def where(*at):
        in_weight = (0, block(*at)) if turned else (block(*at), 0)
        return in_weight if expert is None else (expert(*at), *in_weight)

    return pl.BlockSpec(shape if expert is None else (None, *shape), where)


# ---------------------------------------------------------------------- few rows


def _few_kernel(expert_Z, x_ref, values_ref, scale_ref, *refs, cut, turned, group, precision):
    *offset_refs, out_ref, scale_GO_ref, sums_ref = refs

    def of_weight(ref):
        """Its factors, [G, outputs]."""
        if len(ref.shape) == 2:
            return ref[...] if turned else ref[...].T
        at = expert_Z[pl.program_id(1)] % ref.shape[1]
        return ref[:, pl.ds(at, 1), :].reshape(scale_GO_ref.shape)

    scale_GO_ref[...] = of_weight(scale_ref)
    if offset_refs:
        x_sums_ref, offset_ref = offset_refs
        over_G = (((1,), (0,)), ((), ()))
        sums_ref[...] = -lax.dot_general(
            x_sums_ref[...],
            of_weight(offset_ref),
            over_G,
            precision=lax.Precision.HIGHEST,
            preferred_element_type=jnp.float32,
        )
    else:
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.loop(0, values_ref.shape[1] // cut.inputs)
    def _(n):
        first = pl.multiple_of(n * cut.inputs, cut.inputs)
        at = pl.ds(first, cut.inputs)
        x = x_ref[:, at]
        if cut.copies > 1:
            x, of_copy = x.astype(jnp.float32), lax.broadcasted_iota(jnp.int32, x.shape, 1) // group
            copies = [jnp.where(of_copy == c, x, 0) for c in range(cut.copies)]
            x = jnp.concatenate(copies).astype(x_ref.dtype)
        made = _dot(x, values_ref[:, at].astype(x_ref.dtype), precision)
        for c in range(cut.copies):
            scale = scale_GO_ref[pl.ds(first // group + c, 1), :]
            sums_ref[...] += made[c * cut.rows : (c + 1) * cut.rows] * scale

    out_ref[...] = sums_ref[...].astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1), static_argnames="dtype")
def multiply_blocks(
    cut: Cut, interpret, x_ZXI, values_EOI, scale_EOG, offset_EOG=None, visits=(), *, dtype=jnp.float32
):
    """Blocks of X = cut.rows rows, each times one weight of a stack: [Z, X, O] in `dtype`.

    visits: int32 (expert_Z, number [1]): block z < number is multiplied by weight expert_Z[z], and others may get
    anything; nothing where all blocks are multiplied by the first. Blocks of one weight follow each other.
    """
    (Z, X, I), (E, O, G), outputs = x_ZXI.shape, scale_EOG.shape, cut.outputs
    expert_Z, number = visits or (jnp.zeros(Z, jnp.int32), None)
    turned = _as_stored(scale_EOG)[0]
    factors = [s for s in (scale_EOG, offset_EOG) if s is not None]
    if visits and stored_by_group(E, G):
        n, factors = min(E, SUBLANES), [s.transpose(2, 0, 1) for s in factors]
        of_factors = pl.BlockSpec((G, n, outputs), lambda o, z, expert_Z: (0, expert_Z[z] // n, o))
    else:
        factors = [_as_stored(s)[1] for s in factors]
        of_factors = _factors_spec(turned, outputs, G, lambda o, z, _: o, lambda o, z, expert_Z: expert_Z[z])

    def of_block(*shape):
        return pl.BlockSpec((None, *shape), lambda o, z, _: (z, 0, 0))

    args = [x_ZXI, values_EOI, factors[0]]
    specs = [of_block(X, I), pl.BlockSpec((None, outputs, I), lambda o, z, expert_Z: (expert_Z[z], o, 0)), of_factors]
    if offset_EOG is not None:
        args += [jnp.sum(x_ZXI.reshape(Z, X, G, -1).astype(jnp.float32), axis=-1), factors[1]]
        specs += [of_block(X, G), of_factors]
    return pl.pallas_call(
        functools.partial(_few_kernel, cut=cut, turned=turned, group=I // G, precision=_precision(x_ZXI.dtype)),
        out_shape=jax.ShapeDtypeStruct((Z, X, O), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(O, outputs), Z if number is None else jnp.maximum(number[0], 1)),
            in_specs=specs,
            out_specs=pl.BlockSpec((None, X, outputs), lambda o, z, _: (z, 0, o)),
            scratch_shapes=[pltpu.VMEM((G, outputs), jnp.float32), pltpu.VMEM((X, outputs), jnp.float32)],
        ),
        compiler_params=_compiler_params(("parallel", "arbitrary"), cut.memory),
        interpret=interpret,
        name="weight_only_few",
    )(expert_Z, *args)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _few(cut: Cut, dtype, interpret, x_MI, values_OI, scale_OG, offset_OG):
    x_XI = jnp.pad(x_MI, ((0, cut.rows - len(x_MI)), (0, 0)))
    stack = [None if s is None else s[None] for s in (values_OI, scale_OG, offset_OG)]
    return multiply_blocks(cut, interpret, x_XI[None], *stack, dtype=dtype)[0, : len(x_MI)]


# ---------------------------------------------------------------------- many rows


def _dequantised(values_ref, kept_refs, at, first, number, group, dtype):
    """LANES inputs, from `first` on, of the outputs `at`. number: of their first group.

    kept_refs: scales and perhaps offsets, [outputs, G] filled up to whole registers: no LANES inputs need two of these.
    """
    lanes = pl.ds(pl.multiple_of(number // LANES * LANES, LANES), LANES)
    w = values_ref[at, first : first + LANES].astype(jnp.float32)
    group_of_lane = number % LANES + lax.broadcasted_iota(jnp.int32, w.shape, 1) // group
    scale, *offset = (
        jnp.take_along_axis(ref[at, lanes], group_of_lane, axis=1, mode="promise_in_bounds") for ref in kept_refs
    )
    return (w * scale - offset[0] if offset else w * scale).astype(dtype)


def _keep(stored_refs, kept_refs, turned):
    for stored_ref, kept_ref in zip(stored_refs, kept_refs, strict=True):
        factors = stored_ref[...].T if turned else stored_ref[...]
        kept_ref[:, : factors.shape[1]] = factors


def _many_kernel(x_ref, values_ref, *refs, cut, turned, group, terms, precision):
    stored_refs, out_ref, kept_refs, sums_ref = refs[:terms], refs[terms], refs[terms + 1 : -1], refs[-1]
    piece, block = math.gcd(cut.outputs, PIECE), pl.program_id(2)

    @pl.when(block == 0)
    def _():
        _keep(stored_refs, kept_refs, turned)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    @pl.loop(0, cut.outputs // piece)
    def _(n):
        at = pl.ds(pl.multiple_of(n * piece, piece), piece)
        parts = [
            _dequantised(values_ref, kept_refs, at, first, (block * cut.inputs + first) // group, group, x_ref.dtype)
            for first in range(0, cut.inputs, LANES)
        ]
        sums_ref[:, at] += _dot(x_ref[...], jnp.concatenate(parts, axis=1), precision)

    @pl.when(block == pl.num_programs(2) - 1)
    def _():
        out_ref[...] = sums_ref[...].astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _many(cut: Cut, dtype, interpret, x_MI, values_OI, scale_OG, offset_OG):
    (M, I), (O, G), rows, outputs = x_MI.shape, scale_OG.shape, cut.rows, cut.outputs
    factors = [s for s in (scale_OG, offset_OG) if s is not None]
    turned, terms = _as_stored(scale_OG)[0], len(factors)
    kept = pltpu.VMEM((outputs, _up(G, LANES)), jnp.float32)
    return pl.pallas_call(
        functools.partial(
            _many_kernel, cut=cut, turned=turned, group=I // G, terms=terms, precision=_precision(x_MI.dtype)
        ),
        out_shape=jax.ShapeDtypeStruct((M, O), dtype),
        grid=(pl.cdiv(M, rows), pl.cdiv(O, outputs), I // cut.inputs),
        in_specs=[
            pl.BlockSpec((rows, cut.inputs), lambda m, o, i: (m, i)),
            pl.BlockSpec((outputs, cut.inputs), lambda m, o, i: (o, i)),
            *[_factors_spec(turned, outputs, G, lambda m, o, i: o)] * terms,
        ],
        out_specs=pl.BlockSpec((rows, outputs), lambda m, o, i: (m, o)),
        scratch_shapes=[*[kept] * terms, pltpu.VMEM((rows, outputs), jnp.float32)],
        compiler_params=_compiler_params(("parallel", "parallel", "arbitrary"), cut.memory),
        interpret=interpret,
        name="weight_only_many",
    )(x_MI, values_OI, *[_as_stored(s)[1] for s in factors])


def _dequantise_kernel(_, values_ref, *refs, turned, group, terms):
    stored_refs, out_ref, kept_refs = refs[:terms], refs[terms], refs[terms + 1 :]
    _keep(stored_refs, kept_refs, turned)
    for first in range(0, values_ref.shape[1], LANES):
        of_lanes = _dequantised(values_ref, kept_refs, slice(None), first, first // group, group, out_ref.dtype)
        out_ref[:, first : first + LANES] = of_lanes


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def dequantise(interpret, dtype, n, first, values_EOI, scale_EOG, offset_EOG=None):
    """n weights of a stack, from number `first` on, in `dtype`: [n, O, I]. XLA would write scales of that size too."""
    (_, O, I), G, outputs = values_EOI.shape, scale_EOG.shape[-1], min(values_EOI.shape[1], PIECE)
    factors = [s for s in (scale_EOG, offset_EOG) if s is not None]
    turned, kept = _as_stored(scale_EOG)[0], pltpu.VMEM((outputs, _up(G, LANES)), jnp.float32)
    of_stack = _factors_spec(turned, outputs, G, lambda e, o, _: o, lambda e, o, first: first[0] + e)
    memory = outputs * (I * (2 * dtype.itemsize + 6) + 12 * len(factors) * _up(G, LANES))
    return pl.pallas_call(
        functools.partial(_dequantise_kernel, turned=turned, group=I // G, terms=len(factors)),
        out_shape=jax.ShapeDtypeStruct((n, O, I), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n, pl.cdiv(O, outputs)),
            in_specs=[pl.BlockSpec((None, outputs, I), lambda e, o, first: (first[0] + e, o, 0))]
            + [of_stack] * len(factors),
            out_specs=pl.BlockSpec((None, outputs, I), lambda e, o, _: (e, o, 0)),
            scratch_shapes=[kept] * len(factors),
        ),
        compiler_params=_compiler_params(("parallel", "parallel"), memory),
        interpret=interpret,
        name="weight_only_dequantise",
    )(jnp.reshape(first, 1), values_EOI, *[_as_stored(s)[1] for s in factors])


def _multiply(static, x_MI, values_OI, scale_OG, offset_OG):
    cut, dtype, interpret = static
    return (_few if cut.few else _many)(cut, dtype, interpret, x_MI, values_OI, scale_OG, offset_OG)


_product = with_gradient(_multiply)


# ---------------------------------------------------------------------- counted work


def count(M, O, I, G, *, on: Target, bits=4, offset=False, dtype=jnp.bfloat16, **blocks) -> Count:
    """Of one call. Products of copies of x with zeros are counted too."""
    cut = choose_cut(on, M, O, I, G, bits, offset, dtype, dtype, **blocks)
    item = jnp.dtype(dtype).itemsize
    weight = O * I * bits // 8 + 4 * (1 + offset) * O * G
    if cut.few:
        x = cut.rows * (I * item + 4 * offset * G)
        return Count(2 * cut.rows * cut.copies * O * I, weight + x + cut.rows * O * item, cut.memory)
    down, across = -(-M // cut.rows), -(-O // cut.outputs)
    x_read = M * I * item * (across if cut.inputs < I else 1)  # one block of all inputs stays where it is
    return Count(2 * down * cut.rows * across * cut.outputs * I, down * weight + x_read + M * O * item, cut.memory)
