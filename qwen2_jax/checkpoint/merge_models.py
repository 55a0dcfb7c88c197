# SPDX-License-Identifier: Apache-2.0
"""Merging checkpoints of one architecture: base + scale * merged(model - base, ...), one tensor at a time.

    linear       the weighted sum of the differences (Ilharco et al. 2022, arXiv:2212.04089)
    ties         of each difference the largest entries; of these, those with the sign that has the larger weighted sum;
                 their weighted mean (Yadav et al. 2023, arXiv:2306.01708)
    dare_linear  random entries of each difference, divided by the share kept, then as linear (Yu et al. 2023,
                 arXiv:2311.03099)
    dare_ties    the same, then signs and mean as in ties

Deviation: TIES' share of the largest is one of each tensor, not of the whole model. Entries as large as the smallest
that is kept are kept too, as in its authors' program.
"""

import contextlib
import dataclasses
import warnings
import zlib
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qwen2_jax import validate
from qwen2_jax.checkpoint.api import Opened, open_checkpoint, quantised_types
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.formats.casting import as_dtype, cast_into
from qwen2_jax.checkpoint.formats.protocol import Progress
from qwen2_jax.checkpoint.formats.safetensors_layout import SHARD_BYTES, new_layout
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.checkpoint.sources import Source
from qwen2_jax.checkpoint.transfer.write import Writing, small_files, write_hf
from qwen2_jax.config.model_config import DTYPES
from qwen2_jax.errors import CheckpointError, UserError

METHODS = ("linear", "ties", "dare_linear", "dare_ties")
KEEP = 0.2  # TIES' share
BLOCK = 1 << 20  # entries that are worked on at a time
# Fields of a config in which checkpoints may differ: training, tokens that end a text, how far positions were used, and
# windows by their rule rather than by layer.
FREE = (
    "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "attention_dropout",
    "router_aux_loss_coef", "output_router_logits", "max_position_embeddings", "use_sliding_window", "sliding_window",
    "max_window_layers", "layer_types",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """How differences become one. weights: of the models in order; default equal ones that add to 1."""

    method: str = "linear"
    weights: tuple[float, ...] | None = None
    keep: float | None = None  # share of each tensor's entries that ties and dare keep; None: 0.2
    scale: float = 1.0  # of the merged difference: TIES' lambda
    seed: int = 0  # of DARE's masks

    def __post_init__(self):
        validate.choice("method", self.method, METHODS)
        validate.number(self, "merge", ("keep",), float, 0.0, none=True)
        validate.number(self, "merge", ("seed",), int, 0)
        if not np.isfinite(self.scale):
            raise UserError(f"scale is {self.scale}; it must be a finite number")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise UserError(f"keep is {self.keep}; it is a share of the entries, above 0 and at most 1")
        if self.keep is not None and self.method == "linear":
            raise UserError("keep goes together with ties, dare_linear and dare_ties; linear keeps everything")
        if self.weights is not None and not all(np.isfinite(w) and w > 0 for w in self.weights):
            raise UserError(f"weights are {validate.short(self.weights)}; each must be above 0")

    def weights_of(self, count: int) -> np.ndarray:
        """Weights [count, 1], float32."""
        if self.weights is not None and len(self.weights) != count:
            raise UserError(f"{len(self.weights)} weights for {count} models; give one for each, in their order")
        return np.array(self.weights or [1 / count] * count, np.float32)[:, None]


def merge(
    base: str | Path | Source,
    models: Sequence[str | Path | Source],
    dst: str | Path,
    how: Merge,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Writes the merge of `models` on their common `base` as a new Hugging Face folder; returns its path.

    All are Hugging Face folders or GGUF files; quantised ones are dequantised, with a warning. config.json, tokenizer
    and the other small files are the base's. dtype: of the result; default each tensor as in the base, or the dtype of
    the config where that is quantised; arithmetic is float32. Memory: the result's largest tensor, with ties another
    one in float32, and blocks; of quantised models one tensor each. Masks depend on seed, model's number and tensor's
    name alone.

    Raises CheckpointError for models that are not of the base's architecture, and for numbers that are not finite.
    """
    if not models:
        raise UserError("nothing to merge: give at least one model beside the base")
    if dtype is not None:
        validate.choice("dtype", dtype, DTYPES)
    first = _opened(base)
    if dtype is None and quantised_types(first):
        dtype = first.config.dtype
    merged = Merged(first, [_opened(model) for model in models], how, dtype)
    config, source = merged.base.config, merged.base.source
    if dtype is not None:
        config = dataclasses.replace(config, dtype=dtype)
    files = small_files(config, merged.infos, source, keep_dtype=dtype is None)
    writing = Writing(merged, names.table(merged.base.specs), progress)
    return write_hf(dst, writing, new_layout(merged.infos, max_shard_bytes), files)


class Merged:
    """The tensors of a merge, each made when it is asked for: see Tensors in formats/protocol.py."""

    def __init__(self, base: Opened, models: Sequence[Opened], how: Merge, dtype: str | None):
        self.base, self.models, self.how = base, models, how
        self.weights = how.weights_of(len(models))
        for model in models:
            _same_architecture(base, model)
        _warn_of_quantised((base, *models))
        self.infos = {
            name: TensorInfo(info.dtype if dtype is None else np.dtype(jnp.dtype(dtype)), info.shape)
            for name, info in base.tensors.infos.items()
        }

    def stream(self, wanted: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        for name in wanted:
            if mine is None or name in mine:
                yield name, self.tensor(name)

    def tensor(self, name: str) -> np.ndarray:
        """One merged tensor."""
        info, how = self.infos[name], self.how
        keep = KEEP if how.keep is None else how.keep
        out = np.empty(info.shape, info.dtype)
        flat = out.reshape(-1)
        with contextlib.ExitStack() as stack:
            base, *models = (
                stack.enter_context(opened.tensors.infos[name].mapped()).reshape(-1)  # type: ignore[attr-defined]
                for opened in (self.base, *self.models)
            )
            differences = [
                _Difference(name, base, model, opened) for model, opened in zip(models, self.models, strict=True)
            ]
            least = [d.largest(keep) if how.method == "ties" else 0.0 for d in differences]
            draws = [np.random.default_rng([how.seed, i, zlib.crc32(name.encode())]) for i in range(len(models))]
            for at in range(0, flat.size, BLOCK):
                block = slice(at, at + BLOCK)
                taus = np.stack([d.block(block) for d in differences])
                if how.method == "ties":
                    taus[np.abs(taus) < np.array(least)[:, None]] = 0
                elif how.method != "linear":
                    drawn = np.stack([draw.random(taus.shape[1], np.float32) < keep for draw in draws])
                    taus = np.where(drawn, taus / np.float32(keep), 0)
                tau = self._signed_mean(taus) if how.method.endswith("ties") else (self.weights * taus).sum(0)
                with np.errstate(over="ignore"):
                    cast_into(flat[block], as_dtype(base[block], np.dtype(np.float32)) + np.float32(how.scale) * tau)
                if not np.isfinite(flat[block].astype(np.float32)).all():
                    raise CheckpointError(f"{name}: the merge does not fit into {info.dtype}; give another dtype")
        return out

    def _signed_mean(self, taus: np.ndarray) -> np.ndarray:
        """The weighted mean over the models [models, n] whose sign is that of the weighted sum; 0 where that is 0."""
        weighted = self.weights * taus
        sign = np.sign(weighted.sum(0))
        agree = (np.sign(taus) == sign) & (sign != 0)
        weight = (self.weights * agree).sum(0)
        return np.where(agree, weighted, 0).sum(0) / np.where(weight > 0, weight, 1)


@dataclasses.dataclass(frozen=True)
class _Difference:
    """A model's tensor minus the base's, both flat, in float32 and by blocks."""

    name: str
    base: np.ndarray
    model: np.ndarray
    opened: Opened

    def block(self, block: slice) -> np.ndarray:
        old, new = (as_dtype(x[block], np.dtype(np.float32)) for x in (self.base, self.model))
        difference = new - old
        if not np.isfinite(difference).all():
            where = self.opened.source.path if np.isfinite(old).all() else "the base"
            raise CheckpointError(f"{self.name} of {where} has numbers that are not finite; it cannot be merged")
        return difference

    def largest(self, keep: float) -> float:
        """The magnitude of the k-th largest entry, k = keep * n and 1 at least."""
        n = self.base.size
        magnitudes = np.empty(n, np.float32)
        for at in range(0, n, BLOCK):
            block = slice(at, at + BLOCK)
            magnitudes[block] = np.abs(self.block(block))
        k = max(1, int(keep * n))
        magnitudes.partition(n - k)
        return float(magnitudes[n - k])


def _opened(name: str | Path | Source) -> Opened:
    opened = open_checkpoint(name)
    if opened.source.format.whole_arrays:
        title = opened.source.format.title
        raise CheckpointError(f"{name} is an {title} folder; `convert {name} NEW --to hf` makes one that can be merged")
    return opened


def _warn_of_quantised(opened: Sequence[Opened]) -> None:
    """Raises CheckpointError for AWQ, whose norms and neighbouring weights have factors of their own in each file."""
    for one in opened:
        types = quantised_types(one)
        if any(kind.startswith("AWQ") for kind in types):
            raise CheckpointError(
                f"{one.source.path} is AWQ, which moves scales of its inputs into norms and other weights: its tensors "
                "do not belong to those of other checkpoints; merge unquantised ones and quantise the result"
            )
        if types:
            warnings.warn(
                f"{one.source.path} is quantised ({', '.join(types[:3])}): its rounding is merged as if it had been "
                "trained; merge unquantised checkpoints and quantise the result",
                stacklevel=3,
            )


def _same_architecture(base: Opened, model: Opened) -> None:
    """Raises CheckpointError that names the first field in which they differ."""
    for field in dataclasses.fields(base.config):
        have, want = (getattr(opened.config, field.name) for opened in (model, base))
        if field.name not in FREE and have != want:
            raise CheckpointError(
                f"{model.source.path} has {field.name} {have!r} and the base {want!r}: only checkpoints of one "
                "architecture can be merged"
            )
    if model.config.windows != base.config.windows:
        raise CheckpointError(
            f"{model.source.path} and the base have sliding windows in other layers or of other sizes"
        )
