# SPDX-License-Identifier: Apache-2.0
"""Every operation as work to be timed or counted: inputs of a shape, what they need at least, and what to beat.

A shape is a dict of numbers, {"B": 1, "T": 4096, ...}: dimension letters and a few options. Queries stand at the end of
the keys (a prompt's next chunk), or are all of them. B batch, T query length, S key length or cache slots, N query
heads, K kv heads, H head width; M rows, E experts, D width in, F width out; O outputs, I inputs of integers in groups.

"grouped_weight_only" is grouped_matmul with matrices of integers.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from . import decode_attention as decode
from . import dual_chunk_attention as dual_chunk
from . import flash_attention as flash
from . import grouped_matmul as grouped
from . import weight_only_matmul as weight_only
from .decode_attention import shapes as decode_shapes
from .dual_chunk_attention import shapes as dual_chunk_shapes
from .flash_attention import shapes as flash_shapes
from .grouped_matmul import shapes as grouped_shapes
from .visibility import CHUNK_REGIONS
from .weight_only_matmul import shapes as weight_only_shapes

Shape = Mapping[str, int]
PASSES = ("forward", "backward", "step")  # step: forward and backward as one program


class Need(NamedTuple):
    """The least that any implementation must do: products that the mask or the groups leave, every array moved once."""

    flops: int
    hbm_bytes: int


class Contender(NamedTuple):
    """function(*arrays) is what is timed; gradients are those of all arrays."""

    function: Callable[..., jax.Array]
    arrays: tuple[jax.Array, ...]


class Operation(NamedTuple):
    """How to make, run and count one operation.

    `required` and `optional` are the keys of a shape; an optional one that is None counts as not given.
    """

    required: tuple[str, ...]
    optional: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    trained: bool
    tables: Callable[[], tuple[Mapping, Mapping]]  # (implementations, fastest first; those that run only by name)
    contender: Callable[..., Contender]  # (implementation, shape, dtype)
    rivals: Callable[..., dict[str, Callable[[], Contender]]]  # (names of the implementations, shape, dtype)
    need: Callable[..., Need]  # (shape, dtype, pass)
    table_bytes: Callable[[Shape], int]  # what the reference writes out in full, in float32
    small: Callable[[Shape], Shape]  # the same thing cut down, for comparing with the reference


@functools.lru_cache(maxsize=16)  # contenders share their inputs; bench.py empties it between shapes
def draw(*shape, dtype, seed=0, scale=1.0):
    """Normal numbers, the same at every call."""
    return (jax.random.normal(jax.random.key(seed), shape, jnp.float32) * scale).astype(dtype)


def tables_of(module, prefix=""):
    """The two tables of an operation's module."""
    return getattr(module, f"{prefix}IMPLEMENTATIONS"), getattr(module, f"{prefix}ONLY_BY_NAME", {})


# ---------------------------------------------------------------------- attention


def query_positions(shape: Shape):
    return np.arange(shape["S"] - shape["T"], shape["S"], dtype=np.int64)


def pairs(shape: Shape) -> int:
    """Visible pairs of a query and a key, of all batch rows and one head."""
    seen_T = query_positions(shape) + 1
    return shape["B"] * int(np.minimum(seen_T, shape.get("window") or shape["S"]).sum())


def keys_seen(shape: Shape) -> int:
    """Keys that some query of a row sees."""
    window = shape.get("window")
    return shape["S"] if window is None else min(shape["S"], shape["T"] + window - 1)


def where(shape: Shape):
    """Positions of queries and keys."""
    at_T = jnp.asarray(query_positions(shape), jnp.int32)
    at_S = jnp.arange(shape["S"], dtype=jnp.int32)
    B = shape["B"]
    return {
        "q_positions_BT": jnp.broadcast_to(at_T, (B, len(at_T))),
        "kv_positions_BS": jnp.broadcast_to(at_S, (B, len(at_S))),
        "window": shape.get("window"),
    }


def attention_arrays(shape: Shape, dtype, rotations):
    B, T, S, N, K, H = (shape[x] for x in "BTSNKH")
    queries = [draw(B, T, N, H, dtype=dtype, seed=i) for i in range(rotations)]
    return (*queries, draw(B, S, K, H, dtype=dtype, seed=7), draw(B, S, K, H, dtype=dtype, seed=8))


def flash_contender(implementation, shape: Shape, dtype) -> Contender:
    at = where(shape)

    def run(q, k, v):
        return flash.flash_attention(q, k, v, implementation=implementation, **at)

    return Contender(run, attention_arrays(shape, dtype, 1))


def jax_own(names, shape: Shape, dtype):
    """jax.nn.dot_product_attention, where it computes the same thing and its table of logits fits."""
    if shape["T"] != shape["S"] or logits_bytes(shape) > 2**30:
        return {}
    window = None if shape.get("window") is None else (shape["window"] - 1, 0)

    def run(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=window, implementation="xla")

    return {"jax.nn": lambda: Contender(run, attention_arrays(shape, dtype, 1))}


def without_chunks(shape: Shape) -> Shape:
    """The shape of ordinary attention of the same lengths."""
    return {name: size for name, size in shape.items() if name != "chunk_len"}


def dual_chunk_contender(implementation, shape: Shape, dtype) -> Contender:
    at = where(shape) | {"chunk_len": shape["chunk_len"]}

    def run(q, q_succ, q_inter, k, v):
        return dual_chunk.dual_chunk_attention(q, q_succ, q_inter, k, v, implementation=implementation, **at)

    return Contender(run, attention_arrays(shape, dtype, CHUNK_REGIONS))


def plain_causal(names, shape: Shape, dtype):
    """Ordinary attention of the same lengths, which Dual Chunk Attention should cost no more than."""
    known = [name for name in names if name in tables_of(flash)[0] and name != "reference"]
    return {f"plain causal, {name}": lambda name=name: flash_contender(name, shape, dtype) for name in known}


def attention_need(shape: Shape, dtype, which, rotations) -> Need:
    B, T, N, K, H = (shape[x] for x in "BTNKH")
    product = 2 * pairs(shape) * N * H
    q, kv = B * T * N * H, 2 * B * keys_seen(shape) * K * H
    item, lse = jnp.dtype(dtype).itemsize, 4 * B * T * N
    forward = Need(2 * product, (rotations * q + kv + q) * item)
    # Five products: logits again, dp, and the gradients of q, k and v. Read q, k, v, out, dout, lse; write dq, dk, dv.
    backward = Need(5 * product, (2 * rotations * q + 2 * kv + 2 * q) * item + lse)
    return added(forward, backward, which)


def added(forward: Need, backward: Need, which) -> Need:
    both = Need(forward.flops + backward.flops, forward.hbm_bytes + backward.hbm_bytes)
    return {"forward": forward, "backward": backward, "step": both}[which]


def small_attention(shape: Shape) -> Shape:
    """At most 512 keys and 256 queries; chunks and windows shrink in proportion."""
    S = min(shape["S"], 256 if shape["S"] == shape["T"] else 512)
    K = min(shape["K"], 2)
    cut = {"B": min(shape["B"], 2), "T": min(shape["T"], 256), "S": S, "K": K, "N": shape["N"] // shape["K"] * K}
    scaled = {x: max(1, shape[x] * S // shape["S"]) for x in ("chunk_len", "window") if shape.get(x)}
    return {**shape, **cut, **scaled}


def logits_bytes(shape: Shape) -> int:
    return 4 * shape["B"] * shape["N"] * shape["T"] * shape["S"]


def decode_contender(implementation, shape: Shape, dtype) -> Contender:
    q, q_succ, q_inter, k, v = attention_arrays(shape, dtype, CHUNK_REGIONS)
    at = where(shape) | {"chunk_len": shape.get("chunk_len")}
    del at["kv_positions_BS"]
    k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, S, H]
    scales: tuple = ()
    if shape.get("int8"):
        (k, k_scale), (v, v_scale) = decode.quantize_cache(k), decode.quantize_cache(v)
        scales = (k_scale, v_scale)
    if page := shape.get("page"):
        B, K, S = k.shape[:3]
        pages = S // page  # page p of row b is number p * B + b: neighbours in a row are far apart in memory
        at["block_table_BP"] = jnp.arange(B)[:, None] + B * jnp.arange(pages)

        def paged(x):
            return x.reshape(B, K, pages, page, *x.shape[3:]).transpose(2, 0, 1, 3, *range(4, x.ndim + 1)).reshape(
                pages * B, K, page, *x.shape[3:]
            )  # fmt: skip

        k, v = paged(k), paged(v)
        scales = tuple(paged(x) for x in scales)
    chunked = shape.get("chunk_len") is not None

    def run(q, q_succ, q_inter, k, v, *scales):
        others = (q_succ, q_inter) if chunked else (None, None)
        names = dict(zip(("k_scale", "v_scale"), scales, strict=True)) if scales else {}
        return decode.decode_attention(q, *others, k, v, implementation=implementation, **at, **names)

    return Contender(run, (q, q_succ, q_inter, k, v, *scales))


def read_the_cache(names, shape: Shape, dtype):
    """Adding up the cache: what the memory gives to a program that does nothing else."""

    def contender():
        made = decode_contender(None, {**shape, "page": None}, dtype)
        return Contender(lambda k, v: jnp.sum(k, dtype=jnp.float32) + jnp.sum(v, dtype=jnp.float32), made.arrays[3:5])

    return {"sum of the cache": contender}


def decode_need(shape: Shape, dtype, which) -> Need:
    B, T, N, K, H = (shape[x] for x in "BTNKH")
    item = jnp.dtype(dtype).itemsize
    cached = H + 4 if shape.get("int8") else H * item  # bytes of one key
    rotations = 1 if shape.get("chunk_len") is None else CHUNK_REGIONS
    hbm_bytes = 2 * B * keys_seen(shape) * K * cached + (rotations + 1) * B * T * N * H * item
    return Need(4 * pairs(shape) * N * H, hbm_bytes)


def small_decode(shape: Shape) -> Shape:
    cut = dict(small_attention(shape))
    if page := shape.get("page"):
        cut["page"] = min(page, 128)
        cut["S"] = -(-cut["S"] // cut["page"]) * cut["page"]
    return cut


# ---------------------------------------------------------------------- grouped products


def group_sizes(shape: Shape):
    """Rows of each expert as a balanced router's chance makes them; few rows go to different experts."""
    M, E = shape["M"], shape["E"]
    random = np.random.default_rng(0)
    if M <= E:
        return jnp.asarray(np.isin(np.arange(E), random.permutation(E)[:M]), jnp.int32)
    return jnp.asarray(random.multinomial(M, np.full(E, 1 / E)), jnp.int32)


def grouped_arrays(shape: Shape, dtype, matrices):
    M, E, D, F = (shape[x] for x in "MEDF")
    weights = [draw(E, F, D, dtype=dtype, seed=i, scale=D**-0.5) for i in range(matrices)]
    return draw(M, D, dtype=dtype, seed=7), *weights


def matmul_contender(implementation, shape: Shape, dtype) -> Contender:
    sizes_E = group_sizes(shape)

    def run(x, w):
        return grouped.grouped_matmul(x, w, sizes_E, transpose_w=True, implementation=implementation)

    return Contender(run, grouped_arrays(shape, dtype, 1))


def swiglu_contender(implementation, shape: Shape, dtype) -> Contender:
    sizes_E = group_sizes(shape)

    def run(x, gate, up):
        return grouped.grouped_swiglu(x, gate, up, sizes_E, implementation=implementation)

    return Contender(run, grouped_arrays(shape, dtype, 2))


def joined(products):
    """silu(gate) * up of two products, or the one product."""
    return products[0] if len(products) == 1 else jax.nn.silu(products[0]) * products[1]


def grouped_rivals(names, shape: Shape, dtype, matrices):
    """lax.ragged_dot, and the same FLOPs without any groups."""
    sizes_E = group_sizes(shape)

    def ragged_dot():
        x, *weights = grouped_arrays(shape, dtype, matrices)
        turned = [w.swapaxes(1, 2) for w in weights]  # [E, D, F], which it takes; made before the clock starts
        return Contender(lambda x, *w: joined([jax.lax.ragged_dot(x, y, sizes_E) for y in w]), (x, *turned))

    def one_matrix():
        x, *weights = grouped_arrays({**shape, "E": 1}, dtype, matrices)
        return Contender(lambda x, *w: joined([x @ y.T for y in w]), (x, *(y[0] for y in weights)))

    # Where ragged_dot is among the implementations it is timed as one.
    return ({} if "ragged_dot" in names else {"lax.ragged_dot": ragged_dot}) | {"one dense matmul": one_matrix}


def grouped_need(shape: Shape, dtype, which, matrices) -> Need:
    M, E, D, F = (shape[x] for x in "MEDF")
    product, item = 2 * matrices * M * D * F, jnp.dtype(dtype).itemsize
    active = int((group_sizes(shape) > 0).sum())
    x, y, w = M * D * item, M * F * item, matrices * active * D * F * item
    # Backward: the gradients of x and of the weights; of an expert without rows zeros are written.
    backward = Need(2 * product, 2 * x + matrices * y + w + matrices * E * D * F * item)
    return added(Need(product, x + y + w), backward, which)


def small_grouped(shape: Shape) -> Shape:
    limits = {"M": 512, "E": 8, "D": 512, "F": 512}
    return {x: min(shape[x], limits[x]) for x in "MEDF"}


def expanded_bytes(shape: Shape) -> int:
    return 4 * shape["E"] * shape["M"] * shape["F"]


# ---------------------------------------------------------------------- products with integers in groups


def integers(shape: Shape, *sizes):
    """(values, scale, offset or nothing) of a weight [*sizes, inputs] whose products are about 1."""
    *_, I = sizes
    factors, bits = (*sizes[:-1], I // shape["group"]) if shape.get("group") else sizes[:-1], shape["bits"]
    values = jax.lax.bitcast_convert_type(jax.random.bits(jax.random.key(1), sizes, jnp.uint8), jnp.int8)
    if bits == 4:
        values = (values >> 4).astype(jnp.int4)
    scale = (1 + 0.1 * draw(*factors, dtype=jnp.float32, seed=2)) * I**-0.5 / 2 ** (bits - 1)
    return values, scale, *([draw(*factors, dtype=jnp.float32, seed=3, scale=I**-0.5)] if shape.get("offset") else [])


def weight_only_contender(implementation, shape: Shape, dtype) -> Contender:
    def run(x, values, scale, *offset):
        return weight_only.weight_only_matmul(x, values, scale, *offset, implementation=implementation)

    M, O, I = (shape[letter] for letter in "MOI")
    return Contender(run, (draw(M, I, dtype=dtype, seed=7), *integers(shape, O, I)))


def not_quantised(names, shape: Shape, dtype):
    """The product with a weight in the dtype of x, which quantised ones should beat where there are few rows."""

    def contender():
        x, w = draw(shape["M"], shape["I"], dtype=dtype, seed=7), draw(shape["O"], shape["I"], dtype=dtype, seed=8)
        return Contender(lambda x, w: x @ w.T, (x, w))

    return {"not quantised": contender}


def weight_only_need(shape: Shape, dtype, which) -> Need:
    M, O, I, item = shape["M"], shape["O"], shape["I"], jnp.dtype(dtype).itemsize
    factors = 4 * O * (I // shape["group"]) * (2 if shape.get("offset") else 1)
    return Need(2 * M * O * I, O * I * shape["bits"] // 8 + factors + M * (I + O) * item)


def grouped_weight_only_contender(implementation, shape: Shape, dtype) -> Contender:
    sizes_E = group_sizes(shape)

    def run(x, *parts):
        w = grouped.Scaled(*parts)
        return grouped.grouped_matmul(x, w, sizes_E, transpose_w=True, implementation=implementation)

    M, E, D, F = (shape[letter] for letter in "MEDF")
    return Contender(run, (draw(M, D, dtype=dtype, seed=7), *integers(shape, E, F, D)))


def experts_not_quantised(names, shape: Shape, dtype):
    """The fastest grouped product of matrices in the dtype of x."""
    return {"not quantised": lambda: matmul_contender(None, shape, dtype)}


def grouped_weight_only_need(shape: Shape, dtype, which) -> Need:
    M, D, F, item = shape["M"], shape["D"], shape["F"], jnp.dtype(dtype).itemsize
    factors = 4 * F * (D // (shape.get("group") or D)) * (2 if shape.get("offset") else 1)
    active = int((group_sizes(shape) > 0).sum())
    return Need(2 * M * D * F, active * (D * F * shape["bits"] // 8 + factors) + M * (D + F) * item)


def small_grouped_weight_only(shape: Shape) -> Shape:
    group = shape.get("group") or 1
    D = min(shape["D"], max(group, 512 // group * group))
    return {**shape, **small_grouped({**shape, "D": D})}


def small_weight_only(shape: Shape) -> Shape:
    group = shape["group"]
    I = min(shape["I"], max(group, 512 // group * group))
    return {**shape, "M": min(shape["M"], 512), "O": min(shape["O"], 512), "I": I}


# ---------------------------------------------------------------------- the table

ATTENTION = {"B": 1, "S": lambda shape: shape["T"], "K": lambda shape: shape["N"], "H": 128, "window": None}

OPERATIONS = {
    "flash_attention": Operation(
        required=("T", "N"),
        optional=ATTENTION,
        shapes=flash_shapes.SHAPES,
        trained=True,
        tables=lambda: tables_of(flash),
        contender=flash_contender,
        rivals=jax_own,
        need=functools.partial(attention_need, rotations=1),
        table_bytes=logits_bytes,
        small=small_attention,
    ),
    "dual_chunk_attention": Operation(
        required=("T", "N", "chunk_len"),
        optional=ATTENTION,
        shapes=dual_chunk_shapes.SHAPES,
        trained=True,
        tables=lambda: tables_of(dual_chunk),
        contender=dual_chunk_contender,
        rivals=plain_causal,
        need=functools.partial(attention_need, rotations=CHUNK_REGIONS),
        table_bytes=lambda shape: CHUNK_REGIONS * logits_bytes(shape),
        small=small_attention,
    ),
    "decode_attention": Operation(
        required=("S", "N"),
        optional={"B": 1, "T": 1, "K": ATTENTION["K"], "H": 128, "window": None}
        | {"chunk_len": None, "page": None, "int8": None},
        shapes=decode_shapes.SHAPES,
        trained=False,
        tables=lambda: tables_of(decode),
        contender=decode_contender,
        rivals=read_the_cache,
        need=decode_need,
        table_bytes=lambda shape: logits_bytes(shape) + 8 * shape["B"] * shape["N"] * shape["S"] * shape["H"],
        small=small_decode,
    ),
    "grouped_matmul": Operation(
        required=("M", "E", "D", "F"),
        optional={},
        shapes=grouped_shapes.SHAPES,
        trained=True,
        tables=lambda: tables_of(grouped),
        contender=matmul_contender,
        rivals=functools.partial(grouped_rivals, matrices=1),
        need=functools.partial(grouped_need, matrices=1),
        table_bytes=expanded_bytes,
        small=small_grouped,
    ),
    "grouped_swiglu": Operation(
        required=("M", "E", "D", "F"),
        optional={},
        shapes=grouped_shapes.SHAPES,
        trained=True,
        tables=lambda: tables_of(grouped, "SWIGLU_"),
        contender=swiglu_contender,
        rivals=functools.partial(grouped_rivals, matrices=2),
        need=functools.partial(grouped_need, matrices=2),
        table_bytes=lambda shape: 2 * expanded_bytes(shape),
        small=small_grouped,
    ),
    "weight_only_matmul": Operation(
        required=("M", "O", "I"),
        optional={"group": 128, "bits": 4, "offset": None},
        shapes=weight_only_shapes.SHAPES,
        trained=False,
        tables=lambda: tables_of(weight_only),
        contender=weight_only_contender,
        rivals=not_quantised,
        need=weight_only_need,
        table_bytes=lambda shape: 4 * shape["O"] * shape["I"],
        small=small_weight_only,
    ),
    "grouped_weight_only": Operation(
        required=("M", "E", "D", "F"),
        optional={"group": None, "bits": 4, "offset": None},
        shapes=grouped_shapes.INTEGER_SHAPES,
        trained=False,
        tables=lambda: tables_of(grouped),
        contender=grouped_weight_only_contender,
        rivals=experts_not_quantised,
        need=grouped_weight_only_need,
        table_bytes=lambda shape: expanded_bytes(shape) + 4 * shape["E"] * shape["D"] * shape["F"],
        small=small_grouped_weight_only,
    ),
}


def parse_shape(operation: str, text: str) -> Shape:
    """A shape from its name, from numbers ("T=4096,N=2,H=64"), or from a name with some of them replaced.

    Raises ValueError with what is allowed.
    """
    op = OPERATIONS[operation]
    first, *rest = (part.strip() for part in text.split(","))
    shape: dict[str, Any] = {}
    if "=" in first:
        rest = [first, *rest]
    elif first in op.shapes:
        shape = dict(op.shapes[first])
    else:
        raise ValueError(
            f"--shape {first!r} is no shape of {operation}; --list shows them, or give numbers: T=4096,..."
        )
    known = {*op.required, *op.optional}
    for part in rest:
        name, _, value = part.partition("=")
        if name not in known or not value.isdecimal() or int(value) < 1:
            raise ValueError(f"--shape: {part!r} is not one of {sorted(known)} = a number above 0")
        shape[name] = int(value)
    if missing := [name for name in op.required if name not in shape]:
        raise ValueError(f"--shape {text!r} lacks {', '.join(missing)}")
    for name, default in op.optional.items():
        if name not in shape:
            shape[name] = default(shape) if callable(default) else default
    if "N" in shape and shape["N"] % shape["K"]:
        raise ValueError(f"--shape: N={shape['N']} query heads must be a multiple of K={shape['K']} key/value heads")
    if "T" in shape and shape["T"] > shape["S"]:
        raise ValueError(f"--shape: T={shape['T']} queries stand at the end of S={shape['S']} keys, so T <= S")
    if shape.get("page") and shape["S"] % shape["page"]:
        raise ValueError(f"--shape: a cache of S={shape['S']} slots is no whole number of pages of {shape['page']}")
    inputs = "I" if "I" in shape else "D"
    if "bits" in shape and (shape["bits"] not in (4, 8) or shape[inputs] % (shape["group"] or 1)):
        raise ValueError(f"--shape: bits are 4 or 8 and group={shape['group']} divides {inputs}={shape[inputs]}")
    return {name: value for name, value in shape.items() if value is not None}
