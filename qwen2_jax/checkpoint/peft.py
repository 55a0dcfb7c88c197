# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters as PEFT's folders: adapter_config.json and adapter_model.safetensors.

Names and shapes are PEFT's: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight is [rank, in], lora_B.weight
[out, rank]. What a folder asks for and this project does not do is refused; nothing that changes the result is ignored.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qwen2_jax import validate
from qwen2_jax.checkpoint.api import open_checkpoint, quantised_types
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.formats.collected_errors import CollectedErrors
from qwen2_jax.checkpoint.formats.hf_folder import HfFolder
from qwen2_jax.checkpoint.formats.in_memory import TreeTensors
from qwen2_jax.checkpoint.formats.names import Slot
from qwen2_jax.checkpoint.formats.safetensors import METADATA, header_text, read_header
from qwen2_jax.checkpoint.formats.safetensors_layout import Layout
from qwen2_jax.checkpoint.formats.stored_tensor import StoredTensor, TensorInfo
from qwen2_jax.checkpoint.manifest import Manifest
from qwen2_jax.checkpoint.sources import DEMO, NotFound, Source, locate
from qwen2_jax.checkpoint.transfer import load
from qwen2_jax.checkpoint.transfer.multihost import shared_folder
from qwen2_jax.checkpoint.transfer.write import MARGIN_BYTES, Writing, write_weights
from qwen2_jax.config.model_config import HUB_IDS, ModelConfig
from qwen2_jax.config.presets import QUANTISED_HUB_IDS
from qwen2_jax.errors import CheckpointError, UserError
from qwen2_jax.files.atomic_folder import write_file
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.model import lora as low_rank
from qwen2_jax.model.lora import Lora
from qwen2_jax.validate import short
from qwen2_jax.weights.params import Tree, leaves

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE_SHA256 = "qwen2_jax.base_sha256"  # key in the metadata of adapter_model.safetensors
PREFIX = "base_model.model."  # what PEFT wraps around the model
TENSOR = re.compile(re.escape(PREFIX) + r"(model\.layers\.\d+\..+)\.lora_[AB]\.weight")

READ = ("r", "lora_alpha", "target_modules", "use_rslora", "exclude_modules", "layers_to_transform")
# Keys with a value that has to be one of these. Initialisations that change the base weights are not among them.
ONLY: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "use_rslora": (None, True, False),
    "layers_pattern": (None, "", [], "layers", ["layers"]),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
# Bookkeeping, and settings of training or of features that another key switches on. Other keys must be null or empty.
IGNORED = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode task_type peft_version runtime_config lora_dropout
    megatron_core qalora_group_size eva_config
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
    folder: str | Path,
    config: ModelConfig,
    adapters: Tree,
    lora: Lora,
    base_name: str,
    *,
    base_sha256: str | None = None,
    replace: bool = False,
) -> Path:
    """Writes adapters as a new folder that peft.PeftModel.from_pretrained loads onto the base model. Returns its path.

    base_name: the base model's name on the Hub or its folder, recorded for the reader. base_sha256: of its weights, see
    weights_sha256, recorded in the header of the tensors. The folder appears complete or
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
    layout = Layout({WEIGHTS: header_text(tensors.infos, {} if base_sha256 is None else {BASE_SHA256: base_sha256})})
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
    tensors.errors.raise_any()
    try:
        targets, modules = _adapted_modules(data, config, tensors)
        lora = Lora(
            rank=data.get("r", 8),  # PEFT's default
            alpha=data.get("lora_alpha", 8),
            targets=targets,
            rslora=data.get("use_rslora") is True,
        )
        specs = low_rank.declare(config, lora, unroll=unroll)
    except CheckpointError:
        raise
    except UserError as why:
        raise CheckpointError(f"{path / CONFIG}: {why}") from None
    table, unexpected = _table(specs), []
    for name, slot in table.items():
        if _module(name) not in modules:
            unexpected += [name] if name in tensors.infos else []
            tensors.infos[name] = Zeros(np.dtype(np.float32), slot.shape)
    tensors.errors.add("unexpected by target_modules, exclude_modules and layers_to_transform", unexpected)
    tensors.check(table, tied=False)
    tensors.infos = {name.removeprefix(PREFIX): info for name, info in tensors.infos.items()}
    return lora, tensors.read_params(specs, load.param_shardings(mesh))


@dataclasses.dataclass(frozen=True)
class Zeros(StoredTensor):
    """The adapter of a module that has none. Both of its factors are zero, so it stays zero in training."""

    @property
    def stored_bytes(self) -> int:
        return 0

    def read_into(self, out: np.ndarray, index: tuple[slice, ...], shape: tuple[int, ...]) -> int:
        out[...] = 0
        return 0

    @contextlib.contextmanager
    def mapped(self) -> Iterator[np.ndarray]:
        yield np.zeros(self.shape, self.dtype)


def weights_sha256(source: Source) -> str | None:
    """A SHA-256 of a checkpoint's weights, from its manifest; None where it has none."""
    manifest = Manifest.read(source.path, source.files)
    if manifest is None:
        return None
    rows = sorted(f"{name} {digest}" for name, (_, digest) in manifest.tensors.items())
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def other_base(folder: str | Path, name: str, source: Source) -> str | None:
    """A sentence that names both, where a PEFT folder was trained on another model than the checkpoint `name`.

    The weights' hashes decide where both are known, else the names: a preset and its Hub id are the same, and so are a
    Hub id and its folder in the Hub's cache, and paths to one folder. None where no base is recorded.
    """
    path = Path(folder).expanduser()
    base = (Source("hf", path).read_json(CONFIG) or {}).get("base_model_name_or_path")
    recorded = None
    if (path / WEIGHTS).is_file() and (text := read_header(path / WEIGHTS).text):
        about = parse_json_object(text, str(path / WEIGHTS)).get(METADATA)
        recorded = about.get(BASE_SHA256) if isinstance(about, dict) else None
    here = None if recorded is None else weights_sha256(source)
    trained_on = base if isinstance(base, str) and base.strip() else None
    if here is not None:
        same = recorded == here
    else:
        same = trained_on is None or _canonical(trained_on) == _canonical(name)
    if same:
        return None
    of = "another model" if trained_on is None else validate.key(trained_on)
    return (
        f"{folder} was trained on {of}, and this run's weights are {name}'s: adapters fit the weights that they were "
        "trained on; give their base as start.checkpoint"
    )


def quantised_base(name: str, source: Source, *, adapters: bool) -> str | None:
    """What to know before a checkpoint that is stored quantised is trained, None for any other. name: as it was given.

    adapters: whether these are trained on it, and not the weights themselves.
    """
    if source.kind not in ("quantised", "gguf") or not (types := quantised_types(open_checkpoint(source))):
        return None
    said = f"{name} is quantised ({', '.join(types[:3])}) and is trained as its dequantised values"
    if not adapters:
        return f"{said}; the result is not quantised"
    if any(kind.startswith("AWQ") for kind in types):
        return (
            f"{said}: AWQ moves scales into norms and other weights, so the adapters fit this checkpoint and no other"
        )
    return f"{said}: the adapters fit these, and the unquantised model only nearly"


def _canonical(name: str) -> str:
    text = name.strip()
    if text == DEMO:
        return str(locate(DEMO).path.resolve())
    if text.lower() in (known := HUB_IDS | QUANTISED_HUB_IDS):
        return known[text.lower()].lower()
    path = Path(text).expanduser()
    with contextlib.suppress(OSError, ValueError):  # a name that no file system takes
        if path.exists():
            text = str(path.resolve())
    in_cache = re.search(r"models--([^/]+)--([^/]+)", text)
    return f"{in_cache[1]}/{in_cache[2]}".lower() if in_cache else text.rstrip("/") if text[:1] == "/" else text.lower()


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


def _module(name: str) -> str:
    """model.layers.0.self_attn.q_proj from the name of a tensor."""
    found = TENSOR.fullmatch(name)
    return found[1] if found else ""


def _adapted_modules(data: dict[str, Any], config: ModelConfig, tensors: HfFolder) -> tuple[tuple[str, ...], set[str]]:
    """(Lora.targets, full names of the modules that have adapters) by PEFT's rules (check_target_module_exists).

    A name means a module that has it or ends with it; layers_to_transform counts for names that are not full ones.
    Where PEFT takes a pattern, the tensors in the file say what it matched: an untrusted pattern may run for ever.
    """
    given, excluded, layers = (data.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform"))
    if not isinstance(given, str | list) or (isinstance(given, list) and not _is_list_of(given, str)):
        raise CheckpointError(f"{tensors.path / CONFIG}: target_modules is {short(given)}; it must be a list of names")
    if excluded is not None and not isinstance(excluded, str) and not _is_list_of(excluded, str):
        raise UserError(f"exclude_modules is {short(excluded)}; it must be a list of names")
    layers = [layers] if type(layers) is int else layers or None
    if layers is not None and not _is_list_of(layers, int):
        raise UserError(f"layers_to_transform is {short(data['layers_to_transform'])}; it must be a list of numbers")
    in_file = {_module(name) for name in tensors.infos}
    every = low_rank.declare(config, Lora(rank=1, targets=low_rank.adaptable(config)))
    possible = dict.fromkeys(_module(name) for name in _table(every))
    if isinstance(given, str):
        found = {module for module in possible if module in in_file}
    else:
        known = {ending for module in possible for ending in _endings(module)}
        for target in given:
            if target not in known:
                low_rank.modules(config, target)  # raises an error with what can be adapted
        names, numbers = set(given), None if layers is None else set(layers)
        found = {
            module
            for module in possible
            if module in names
            or (not names.isdisjoint(_endings(module)) and (numbers is None or int(module.split(".")[2]) in numbers))
        }
    if isinstance(excluded, str):
        found &= in_file
    elif excluded:
        found = {module for module in found if set(excluded).isdisjoint(_endings(module))}
    short_names = tuple(dict.fromkeys(module.split(".", 3)[3] for module in possible if module in found))
    whole = not isinstance(given, str) and not excluded and layers is None
    if whole and not any(target in possible or target.startswith("layers.") for target in given):
        return tuple(given), found
    return short_names, found


def _endings(module: str) -> set[str]:
    parts = module.split(".")
    return {".".join(parts[i:]) for i in range(len(parts))}


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)


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
