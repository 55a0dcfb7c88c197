# SPDX-License-Identifier: Apache-2.0
"""A model rounded by GPTQ to 4 bits, layer by layer, into a new Hugging Face folder that is checked before it appears.

The folder is the one that the official GPTQ-Int4 checkpoints have: symmetric, in groups, no act-order, version 1.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from qwen2_jax.checkpoint.api import quantised_types
from qwen2_jax.checkpoint.by_layer import ByLayer
from qwen2_jax.checkpoint.formats import names, quantised_folder
from qwen2_jax.checkpoint.formats.in_memory import recast
from qwen2_jax.checkpoint.formats.protocol import Progress
from qwen2_jax.checkpoint.formats.safetensors_layout import SHARD_BYTES, new_layout
from qwen2_jax.checkpoint.formats.small_files import CONFIG, MANIFEST, REPORT, small_file
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.checkpoint.gptq.calibrate import DAMP, Rounded, linears, round_layer
from qwen2_jax.checkpoint.gptq.rounding import PER_WORD, packed
from qwen2_jax.checkpoint.manifest import Manifest, compare, sha256
from qwen2_jax.checkpoint.sources import Source
from qwen2_jax.checkpoint.token_rows import token_rows
from qwen2_jax.checkpoint.transfer.write import MARGIN_BYTES, json_bytes, small_files, write_weights
from qwen2_jax.errors import CheckpointError
from qwen2_jax.files.atomic_folder import new_folder, write_file
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.model.divergence import divergence
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.weights.weight import summed

# N sequences  T tokens of each  D model width  I inputs  O outputs

GROUPS = (128, 64, 32)
SEQUENCES, LENGTH = 128, 2048
HELD_OUT = 8  # sequences at most on which the new model is compared, one for each SEQUENCES / 16
MAX_KL = 0.2  # nats, mean; the 4-bit models that we measured are below a half of it (docs/checkpoints.md)


@dataclasses.dataclass(frozen=True)
class Check:
    """What was done, and how far the new model is from the original. kl: Divergence.summary on held-out text."""

    group_size: int
    sequences: int
    length: int
    kl: dict[str, float]
    modules: dict[str, dict]  # of each module: error, plain_error, tokens, method; see calibrate.Rounded

    def table(self) -> str:
        """Errors of each layer, for people: mean over its modules, and the largest."""
        rows: list[tuple[str, ...]] = [
            ("layer", "error of outputs", "by rounding", "largest", "in", "not by plain GPTQ")
        ]
        by_layer = itertools.groupby(self.modules.items(), key=lambda item: int(item[0].split(".")[2]))
        for layer, group in by_layer:
            of = dict(group)
            worst = max(of, key=lambda name: of[name]["error"])
            other = sum(one["method"] != "gptq" for one in of.values())
            mean = [f"{np.mean([one[key] for one in of.values()]):.2%}" for key in ("error", "plain_error")]
            where = worst.split(".", 3)[3]
            rows.append((str(layer), *mean, f"{of[worst]['error']:.2%}", where, str(other)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows]
        few = sorted({f"{one['method']} ({one['tokens']} tokens): {name}" for name, one in self.modules.items()
                      if one["method"] != "gptq"})  # fmt: skip
        lines += few[:20] + ([f"... and {len(few) - 20} more; {REPORT} has all"] if len(few) > 20 else [])
        kl = self.kl
        lines.append(
            f"calibrated on {self.sequences} sequences of {self.length} tokens, groups of {self.group_size}; "
            f"on {kl['positions']} held-out tokens: KL to the original {kl['mean_kl']:.4f} nats in the mean, "
            f"{kl['median_kl']:.4f} median, {kl['p99_kl']:.3f} at 99%; the same most probable token at {kl['top1']:.1%}"
        )
        return "\n".join(lines)


def write_gptq(
    src: str | Path | Source,
    dst: str | Path,
    text: str | Path,
    *,
    dtype: str | None = None,
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    max_kl: float = MAX_KL,
    progress: Progress | None = None,
    show: Callable[[str], None] | None = None,
) -> Check:
    """Writes the model `src` to the new folder `dst`, holding one layer and the activations of all tokens in float32.

    text: what to calibrate and compare on, see token_rows. dtype: of what stays unquantised; default: its own.
    sequences, length: of the calibration. show: gets the table before the model is judged.

    Raises:
        CheckpointError: the model has no form in GPTQ, is not finite, or its mean KL is above max_kl; nothing is left.
    """
    if jax.process_count() > 1:
        raise CheckpointError("GPTQ folders are written by one process; run this convert in one")
    model = ByLayer(src)
    opened = model.opened
    group = _group(model)
    with opened.source.folder_of_small_files() as folder:
        tokenizer = Tokenizer.from_folder(folder)
    held = max(1, min(HELD_OUT, sequences // 16))
    limit = min(length, model.config.trained_length)
    rows = token_rows(text, tokenizer, sequences + held, limit)
    if rows.max() >= model.config.vocab_size:
        raise CheckpointError(f"the tokenizer has the id {rows.max()}, and the model {model.config.vocab_size} tokens")
    held = max(1, min(held, len(rows) // 9))
    aside = np.linspace(0, len(rows) - 1, held + 2).round().astype(int)[1:-1] if len(rows) > 2 else np.array([1])
    tensors = Calibrated(model, np.delete(rows, aside, axis=0), rows[aside], group, dtype, progress)
    layout = new_layout(tensors.infos, SHARD_BYTES)
    files = small_files(model.config, tensors.plain.infos, opened.source)
    config = parse_json_object(files[CONFIG], CONFIG)
    files[CONFIG] = json_bytes(config | {"quantization_config": _settings(group)})
    total = sum(info.nbytes for info in tensors.infos.values())
    with jax.default_matmul_precision("highest"), new_folder(dst, total + MARGIN_BYTES) as folder:
        write_weights(folder, tensors, layout, lambda name, array: lambda: None)
        for name, content in files.items():
            write_file(small_file(folder, name, "the checkpoint", writing=True), content)
        there = quantised_folder.FORMAT.files(folder)
        hashes = {name: sha256(np.frombuffer(there.read_bytes(name) or b"", np.uint8)) for name in files}
        write_file(folder / MANIFEST, Manifest(tensors.meant, hashes).to_bytes())
        written = ByLayer(Source(quantised_folder.FORMAT.name, folder))
        wrong = compare(folder, there, written.opened.tensors, None).damaged
        if wrong:
            raise CheckpointError(f"{dst} does not read back as it was meant: {'; '.join(wrong[:3])}")
        kl = divergence(
            tensors.hidden(), model.head(), written.hidden(rows[aside]), written.head(), rows[aside]
        ).summary()
        check = Check(group, len(rows) - held, rows.shape[1], kl, tensors.modules)
        if show is not None:
            show(check.table())
        if not kl["mean_kl"] <= max_kl:
            raise CheckpointError(
                f"the mean KL of {kl['mean_kl']:.4f} nats is above {max_kl:g}, so nothing is written; "
                "give more or more fitting text, or a larger --max-kl"
            )
        write_file(folder / REPORT, (json.dumps(dataclasses.asdict(check), indent=1) + "\n").encode())
    return check


def _group(model: ByLayer) -> int:
    """The largest size of a group that divides the inputs of all matrices. Raises CheckpointError where none does."""
    of = dict(_matrices(model))
    for name, (outputs, _) in of.items():
        if outputs % PER_WORD:
            raise CheckpointError(f"{name} has {outputs} outputs; GPTQ packs them by {PER_WORD}")
    fits = [group for group in GROUPS if all(inputs % group == 0 for _, inputs in of.values())]
    if not fits:
        name, (_, inputs) = next((n, shape) for n, shape in of.items() if shape[1] % GROUPS[-1])
        raise CheckpointError(f"{name} has {inputs} inputs; GPTQ needs a multiple of {GROUPS[-1]}, better {GROUPS[0]}")
    return fits[0]


def _matrices(model: ByLayer) -> Iterator[tuple[str, tuple[int, int]]]:
    """(the weight's name, (outputs, inputs)) of every matrix that is rounded."""
    for i in range(model.config.num_hidden_layers):
        for spec in linears(model.specs["stacks"][i]).values():
            inputs = math.prod(spec.shape[-summed(spec) :])
            for name in names.hf_names(spec, 0):
                yield name, (math.prod(spec.hf_shape) // inputs, inputs)


def _settings(group: int) -> dict:
    try:
        version = importlib.metadata.version("qwen2-jax")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    return {
        "quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": False,
        "damp_percent": DAMP, "static_groups": False, "true_sequential": False, "lm_head": False,
        "checkpoint_format": "gptq", "pack_dtype": "int32", "meta": {"quantizer": [f"qwen2_jax:{version}"]},
    }  # fmt: skip


class Calibrated:
    """The tensors of the new folder, computed while they are streamed.

    infos: of all. plain: the tensors that stay as they are. meant: (info, SHA-256) of every weight as a reader gives
    it. modules: see Check. hidden: the original's hidden states of the held-out tokens, when all is streamed.
    """

    def __init__(
        self,
        model: ByLayer,
        tokens_NT: np.ndarray,
        held_NT: np.ndarray,
        group: int,
        dtype: str | None,
        progress: Progress | None,
    ):
        self.model, self.group, self.progress = model, group, progress
        self.tokens_NT, self.held_NT = tokens_NT, held_NT
        stored = model.opened.tensors
        if dtype is None and quantised_types(model.opened):
            dtype = model.config.dtype
        self.plain = stored if dtype is None else recast(stored, dtype)
        self.infos: dict[str, TensorInfo] = {}
        shapes = dict(_matrices(model))
        for name, info in self.plain.infos.items():
            if name in shapes:
                self.infos |= _packed_infos(name, *shapes[name], group)
            else:
                self.infos[name] = TensorInfo(info.dtype, info.shape)
        self.meant: dict[str, tuple[TensorInfo, str]] = {}
        self.modules: dict[str, dict] = {}
        self._held_NTD: np.ndarray | None = None

    def hidden(self) -> np.ndarray:
        """[N, T, D] in float32."""
        assert self._held_NTD is not None, "all tensors are streamed first"
        return self._held_NTD

    def stream(self, wanted: Sequence[str], mine: Container[str] | None = None) -> Iterator[tuple[str, np.ndarray]]:
        """See Tensors in protocol.py. All tensors come, in an order of their own."""
        assert mine is None
        assert set(wanted) == self.infos.keys()
        for name, array in self.plain.stream([name for name in self.plain.infos if name in self.infos]):
            self.meant[name] = (TensorInfo(array.dtype, array.shape), sha256(array))
            yield name, array
        model, layers = self.model, self.model.config.num_hidden_layers
        x_NTD, held_NTD = model.embedded(self.tokens_NT), model.embedded(self.held_NT)
        for i in range(layers):
            params = model.layer(i)
            done, rounded = round_layer(model, i, params, x_NTD, self.group)
            for module, one in done.items():
                yield from self._packed(module, one)
            model.run(i, params, held_NTD)
            model.run(i, rounded, x_NTD)
            if self.progress is not None:
                total = sum(info.nbytes for info in self.plain.infos.values())
                self.progress(total * (i + 1) // layers, total)
        model.normed(held_NTD)
        self._held_NTD = held_NTD

    def _packed(self, module: str, one: Rounded) -> Iterator[tuple[str, np.ndarray]]:
        self.meant[f"{module}.weight"] = (TensorInfo(one.meant_OI.dtype, one.meant_OI.shape), sha256(one.meant_OI))
        self.modules[module] = {
            "error": one.error, "plain_error": one.plain_error, "tokens": one.tokens, "method": one.method,
        }  # fmt: skip
        for suffix, array in packed(one.q_OI, one.scale_OG).items():
            yield f"{module}.{suffix}", array


def _packed_infos(name: str, outputs: int, inputs: int, group: int) -> dict[str, TensorInfo]:
    module, integers = name.removesuffix(".weight"), np.dtype(np.int32)
    shapes: dict[str, tuple[np.dtype, tuple[int, ...]]] = {
        "qweight": (integers, (inputs // PER_WORD, outputs)),
        "qzeros": (integers, (inputs // group, outputs // PER_WORD)),
        "scales": (np.dtype(np.float16), (inputs // group, outputs)),
        "g_idx": (integers, (inputs,)),
    }
    return {f"{module}.{suffix}": TensorInfo(*info) for suffix, info in shapes.items()}
