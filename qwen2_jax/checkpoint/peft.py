# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors.

Names and shapes are PEFT's: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [rank, in], lora_B.weight
[out, rank]. What a folder asks for and this project does not do is refused; nothing that changes the result is ignored.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.formats.collected_errors import CollectedErrors
from qwen2_jax.checkpoint.formats.hf_folder import HfFolder
from qwen2_jax.checkpoint.formats.in_memory import TreeTensors
from qwen2_jax.checkpoint.formats.names import Slot
from qwen2_jax.checkpoint.formats.safetensors import header_text
from qwen2_jax.checkpoint.formats.safetensors_layout import Layout
from qwen2_jax.checkpoint.formats.stored_tensor import TensorInfo
from qwen2_jax.checkpoint.sources import NotFound, Source
from qwen2_jax.checkpoint.transfer import load
from qwen2_jax.checkpoint.transfer.multihost import shared_folder
from qwen2_jax.checkpoint.transfer.write import MARGIN_BYTES, Writing, write_weights
from qwen2_jax.config.model_config import ModelConfig
from qwen2_jax.errors import CheckpointError, UserError
from qwen2_jax.files.atomic_folder import write_file
from qwen2_jax.model import lora as low_rank
from qwen2_jax.model.lora import Lora
from qwen2_jax.validate import short
from qwen2_jax.weights.params import Tree, leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."  # what PEFT wraps around the model
MODULE = re.compile(re.escape(PREFIX) + r"model\.layers\.\d+\.(.+)\.lora_[AB]\.weight")

READ = ("r", "lora_alpha", "target_modules", "use_rslora")
# Keys with a value that has to be one of these. Initialisations that change the base weights are not among them.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
# Bookkeeping, and settings of training or of features that another key switches on. Other keys must be null or empty.
IGNORED = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode task_type peft_version runtime_config lora_dropout
    layers_pattern megatron_core qalora_group_size eva_config
    """.split()  # noqa: SIM905
)


class AdapterFolder(HfFolder):
    """A folder of which only adapter_model.safetensors is read."""

    def _files(self) -> tuple[list[str], None]:
        return [WEIGHTS], None


class AdapterTensors(TreeTensors):
    """Adapters in memory, stacked or unrolled, as the tensors of a PEFT folder."""

    def __init__(self, config: ModelConfig, adapters: Tree, lora: Lora):
        self.params, self.specs = adapters, _specs_like(config, adapters, lora)
        self.table = _table(self.specs)
        dtype = np.dtype(np.float32)
        self.infos = {name: TensorInfo(dtype, slot.shape) for name, slot in self.table.items()}


def save_peft(
    folder: str | Path, config: ModelConfig, adapters: Tree, lora: Lora, base_name: str, *, replace: bool = False
) -> Path:
    """Writes adapters as a new folder that peft.PeftModel.from_pretrained loads onto the base model. Returns its path.

    base_name: the base model's name on the Hub or its folder, recorded for the reader. The folder appears complete or
    not at all. replace: an existing folder is replaced when the new one is complete. Where several processes
    run, all of them call this with one path on a shared disk.
    """
    tensors = AdapterTensors(config, adapters, lora)
    about = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,  # PEFT declares a whole number
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "target_modules": _target_modules(config, lora),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }
    layout = Layout({WEIGHTS: header_text(tensors.infos)})
    nbytes = sum(info.nbytes for info in tensors.infos.values()) + MARGIN_BYTES

    writing = Writing(tensors, tensors.table, None)
    with shared_folder(folder, nbytes, replace=replace) as work:
        write_weights(work, tensors, layout, _unobserved, order=writing.order, mine=writing.mine)
        if jax.process_index() == 0:
            write_file(work / CONFIG, (json.dumps(about, indent=2) + "\n").encode())
    return Path(folder)


def load_peft(
    folder: str | Path, config: ModelConfig, *, unroll: bool = False, mesh: jax.sharding.Mesh | None = None
) -> tuple[Lora, Tree]:
    """(settings, float32 adapters) from a PEFT folder made for this model. unroll and mesh as in load_params.

    Raises CheckpointError that lists everything missing, unexpected, misshapen and not supported.
    """
    path = Path(folder).expanduser()
    data = Source("hf", path).read_json(CONFIG)
    if data is None:
        raise NotFound(f"{path} has no {CONFIG}; give a folder that PEFT's save_pretrained or save_peft wrote")
    _check(data, CollectedErrors(str(path / CONFIG)))
    if not (path / WEIGHTS).is_file():
        raise NotFound(f"{path} has no {WEIGHTS}; adapters saved as pickle (adapter_model.bin) are not read")
    tensors = AdapterFolder(path)
    try:
        lora = Lora(
            rank=data.get("r", 8),  # PEFT's default
            alpha=data.get("lora_alpha", 8),
            targets=_targets(data.get("target_modules"), tensors),
            rslora=bool(data.get("use_rslora")),
        )
        specs = low_rank.declare(config, lora, unroll=unroll)
    except CheckpointError:
        raise
    except UserError as why:
        raise CheckpointError(f"{path / CONFIG}: {why}") from None
    tensors.check(_table(specs), tied=False)
    tensors.infos = {name.removeprefix(PREFIX): info for name, info in tensors.infos.items()}
    return lora, tensors.read_params(specs, load.param_shardings(mesh))


def _check(data: dict[str, Any], errors: CollectedErrors) -> None:
    """Raises CheckpointError for settings that mean something else than plain LoRA."""
    for key, value in data.items():
        if key in ONLY and value not in ONLY[key]:
            errors.add("not supported", [f"{key} = {short(value)} (only {', '.join(map(str, ONLY[key]))})"])
        elif key not in (*READ, *ONLY, *IGNORED) and value:
            errors.add("not supported", [f"{key} = {short(value)}"])
    if "peft_type" not in data:
        errors.add("missing", ["peft_type"])
    errors.raise_any()


def _targets(given: Any, tensors: HfFolder) -> tuple[str, ...]:
    """Lora.targets from target_modules: a list of names; or a pattern, which is what the file holds."""
    if isinstance(given, list):
        return tuple(given)
    if not isinstance(given, str):
        raise CheckpointError(f"{tensors.path / CONFIG}: target_modules is {short(given)}; it must be a list of names")
    tensors.errors.raise_any()
    return tuple(dict.fromkeys(found[1] for name in tensors.infos if (found := MODULE.fullmatch(name))))


def _target_modules(config: ModelConfig, lora: Lora) -> list[str]:
    """target_modules for PEFT: the targets; where a name would mean the routed experts too, the modules' full names."""
    full = {target: low_rank.modules(config, target) for target in lora.targets}
    return [
        name
        for target, found in full.items()
        for name in (found if any(module.startswith("mlp.") for module in found) and config.num_experts else (target,))
    ]


def _table(specs: Tree) -> dict[str, Slot]:
    """Every tensor name of a PEFT folder with these adapters."""
    return {PREFIX + name: slot for name, slot in names.table(specs).items()}


def _specs_like(config: ModelConfig, adapters: Tree, lora: Lora) -> Tree:
    """The declarations that these adapters follow: stacked or unrolled."""
    stacked = low_rank.declare(config, lora)
    have = {path: tuple(value.shape) for path, value in leaves(adapters)}
    for specs in (stacked, names.unrolled(stacked)):
        if have == {path: spec.shape for path, spec in leaves(specs)}:
            return specs
    raise CheckpointError("the adapters do not fit the model's config and the adapters' settings: were others trained?")


def _unobserved(name: str, array: np.ndarray) -> Callable[[], None]:
    return lambda: None
