# SPDX-License-Identifier: Apache-2.0
"""The report of --dry-run: parameters, memory, tokens, FLOPs, and the first row of the first batch as text."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.console import readable_bytes
from qwen2_jax.data.tokens.packing import Batch
from qwen2_jax.data.tokens.show import MARKS, STYLES, rank_name, runs
from qwen2_jax.model import flops
from qwen2_jax.model.cross_entropy import CHUNK
from qwen2_jax.parallel import chips
from qwen2_jax.tokenizer import Tokenizer


class Bytes(NamedTuple):
    """Bytes of arrays: in all, and on the device with the most."""

    total: float
    device: float

    def __add__(self, other: Any) -> "Bytes":
        return Bytes(self.total + other.total, self.device + other.device)


def report(
    config: ModelConfig,
    *,
    trained: Any,
    optimizer: Any,
    batch: Batch,
    tokenizer: Tokenizer,
    console: Console,
    rows: int,
    steps: int,
    accumulate: int = 1,
    row_parts: int = 1,
    dtype: str = "bfloat16",
    remat: str | None = "full",
    ema: Any = None,
    frozen: Any = None,
    sources: Sequence[Mapping[str, Any]] = (),
    epochs: Sequence[tuple[str, float]] = (),
    shown: int = 600,
    ranks: int = 1,
) -> None:
    """Prints sizes, memory and data of a run, and its first row.

    trained, optimizer, ema, frozen: trees of arrays or jax.ShapeDtypeStruct (with shardings, where there is a mesh);
    frozen: the weights below adapters. batch: the first one, whole or this host's part. rows: of a whole batch, cut
    into `accumulate` micro-batches and divided among `row_parts` devices. sources: rows of a table, as
    data.loader.Loaded.report gives them; epochs: of each source. shown: tokens of the row that are printed. ranks: of
    its groups (data.packing); 1: it has documents.
    """
    lengths = flops.segment_lengths(batch.segments_BT)
    share = rows / len(batch.tokens_BT)
    real = float(lengths.sum()) * share
    length = batch.tokens_BT.shape[-1]
    cost = flops.train_flops(config, lengths, frozen=frozen is not None) * share

    numbers = Table("", "", show_header=False, box=None, padding=(0, 2))
    numbers.add_row("parameters", f"{flops.parameters(config):,}")
    numbers.add_row("  a token meets", f"{flops.active_parameters(config):,}")
    numbers.add_row("  of the embeddings", f"{flops.embedding_parameters(config):,}")
    numbers.add_row("  trained", f"{sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trained)):,}")
    numbers.add_row(
        "batch",
        f"{rows:,} rows x {length:,} = {rows * length:,} tokens"
        + (f", in {accumulate} micro-batches" if accumulate > 1 else ""),
    )
    numbers.add_row("  in the first one", f"{real:,.0f} tokens, {1 - real / (rows * length):.1%} padding")
    numbers.add_row("steps", f"{steps:,}")
    numbers.add_row("tokens in all", f"{steps * rows * length:,}")
    for name, count in epochs:
        numbers.add_row(f"epochs of {name}", f"{count:.2f}")
    numbers.add_row("FLOPs per step", f"{cost:.3g}{_time_at_peak(cost)}")
    console.print(Rule("dry run", align="left"), numbers)
    if sources:
        console.print(Rule("data", align="left"), _table(sources, console.width))
    memory = memory_by_kind(
        config, trained=trained, optimizer=optimizer, ema=ema, frozen=frozen, dtype=dtype, remat=remat,
        tokens=rows * length // accumulate, row_parts=row_parts,
    )  # fmt: skip
    console.print(Rule("memory", align="left"), _bytes_table(memory))
    console.print(Rule("first row of the first batch", align="left"))
    marks = ("", "") if console.color_system else MARKS
    console.print(Text.assemble("targets: ", (f"{marks[0]}like this{marks[1]}", STYLES["target"])))
    console.print(first_row(batch, tokenizer, shown=shown, marks=marks, ranks=ranks), soft_wrap=True, highlight=False)


def memory_by_kind(
    config: ModelConfig,
    *,
    trained: Any,
    optimizer: Any,
    ema: Any = None,
    frozen: Any = None,
    dtype: str = "bfloat16",
    remat: str | None = "full",
    tokens: int,
    row_parts: int = 1,
) -> dict[str, Bytes]:
    """Bytes of everything that a step holds, by name; activations are estimated. tokens: of one micro-batch."""
    master = size(trained)
    kinds = {"weights, float32": master}
    for name, leaves in named_leaves(optimizer).items():
        kinds[f"optimizer: {name}"] = size(leaves)
    if ema is not None:
        kinds["average of the weights"] = size(ema)
    kinds["gradients, float32"] = master
    if frozen is not None:
        kinds["frozen weights"] = size(frozen)
    elif dtype != "float32":
        half = jnp.dtype(dtype).itemsize / 4
        kinds[f"weights, {dtype}"] = Bytes(master.total * half, master.device * half)
    kept = tokens * kept_per_token(config, remat) * jnp.dtype(dtype).itemsize
    kinds["activations, about"] = Bytes(kept, kept / row_parts)
    if not config.scores:
        tile = 2 * CHUNK * config.vocab_size * 4  # logits of a chunk and their gradient
        kinds["logits, about"] = Bytes(tile * row_parts, tile)
    return kinds


def kept_per_token(config: ModelConfig, remat: str | None) -> int:
    """Activations per token that the forward pass of all layers stores for the backward pass; only the large ones.

    remat "full" stores each layer's input, "dots" also the outputs of its projections, None nearly everything. The
    layer whose backward pass runs needs what None stores of it.
    """
    width, keys = config.hidden_size, config.num_key_value_heads * config.head_dim
    queries = config.num_attention_heads * config.head_dim
    dots, everything = [], []
    for layer in range(config.num_hidden_layers):
        shared = config.shared_expert_intermediate_size if config.is_sparse(layer) else config.intermediate_size
        routed = config.num_experts_per_tok * config.moe_intermediate_size if config.is_sparse(layer) else 0
        dots.append(queries + 2 * keys + width + 2 * shared + width)
        # Also: both norms' outputs and the sum between them, rotated queries and keys, attention's result, the
        # activation and its product; and all that of the routed experts, whose inputs are copies.
        rest = 3 * width + 2 * queries + keys + 2 * shared + 4 * routed + 2 * width * bool(routed)
        everything.append(dots[-1] + rest)
    inputs = config.num_hidden_layers * width
    working = max(everything)
    return inputs + {"full": working, "dots": sum(dots) + working, None: sum(everything)}[remat]


def size(tree: Any) -> Bytes:
    """Bytes of a tree of arrays or their shapes. Leaves without a sharding are replicated."""
    total = device = 0.0
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        part = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        itemsize = jnp.dtype(leaf.dtype).itemsize
        total += math.prod(leaf.shape) * itemsize
        device += math.prod(part) * itemsize
    return Bytes(total, device)


def named_leaves(optimizer: Any) -> dict[str, list[Any]]:
    """Leaves of an optax state under the name of the field that holds them: mu, nu, count, v_row, ..."""
    named: dict[str, list[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(optimizer):
        fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        named.setdefault(fields[-1] if fields else "state", []).append(leaf)
    return named


def first_row(
    batch: Batch, tokenizer: Tokenizer, *, shown: int = 600, marks: tuple[str, str] = ("", ""), ranks: int = 1
) -> Text:
    """The documents of a batch's first row: targets are marked, special tokens are written out.

    The last token of a document is its last target, which is not an input. marks: put around targets. ranks: of
    groups, whose sequences are shown one by one and end in an input.
    """
    tokens, targets, weights, segments, _ = (np.asarray(field).reshape(-1, field.shape[-1])[0] for field in batch[:5])
    text, left = Text(), shown
    starts = np.flatnonzero(np.diff(segments, prepend=-2))
    for start, end in zip(starts, [*starts[1:], len(segments)], strict=True):
        if segments[start] < 0:
            text.append(f"\n--- {end - start} tokens of padding ---\n", "bold")
            continue
        ids = [*tokens[start:end].tolist(), int(targets[end - 1])]
        is_target = [False, *(weights[start:end] > 0).tolist()]
        name = f"document {segments[start]}"
        if ranks > 1:
            ids, is_target = ids[:-1], is_target[:-1]
            name = f"group {segments[start] // ranks}, {rank_name(segments[start] % ranks, ranks)}"
        counted = f"{end - start} tokens, {sum(is_target)} targets"
        text.append(f"{chr(10) if start else ''}--- {name}: {counted} ---\n", "bold")
        for spelled, kind in runs(tokenizer, ids[:left], is_target[:left], marks):
            text.append(spelled, kind)
        if len(ids) > left:
            text.append(f" ... {len(ids) - left} more tokens", "bold")
        left = max(0, left - len(ids))
    return text


def _time_at_peak(cost: float) -> str:
    """The time of this many FLOPs on this machine's devices at their peak rate, if that is known."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    peak = chips.peak_of(kind)
    return "" if peak is None else f", {cost / (peak.tflops * 1e12 * count):.3g} s at the peak of {count} x {kind}"


def _table(sources: Sequence[Mapping[str, Any]], width: int) -> Table:
    """A row for each source; where that is wider than the screen, a column for each."""
    names = list(dict.fromkeys(name for source in sources for name in source))
    cells = [[_shown(source.get(name)) for source in sources] for name in names]
    needed = sum(2 + max(map(len, (name, *shown))) for name, shown in zip(names, cells, strict=True))
    table = Table(box=None, padding=(0, 2, 0, 0))
    if needed <= width:
        for name in names:
            table.add_column(name, justify="left" if isinstance(sources[0].get(name), str) else "right")
        for row in zip(*cells, strict=True):
            table.add_row(*row)
        return table
    for title in (names[0], *cells[0]):
        table.add_column(title, justify="left" if title == names[0] else "right", overflow="fold")
    for name, shown in zip(names[1:], cells[1:], strict=True):
        table.add_row(name, *shown)
    return table


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else "" if value is None else str(value)


def _bytes_table(kinds: Mapping[str, Bytes]) -> Table:
    table = Table("", box=None, padding=(0, 2, 0, 0))
    table.add_column("in all", justify="right")
    table.add_column("per device", justify="right")
    for name, kind in {**kinds, "together": sum(kinds.values(), start=Bytes(0, 0))}.items():
        table.add_row(name, readable_bytes(kind.total), readable_bytes(kind.device))
    return table
