# SPDX-License-Identifier: Apache-2.0
"""From what a user types to a folder: presets, Hugging Face Hub ids, local folders, gs:// paths, the bundled demo."""

import contextlib
import dataclasses
import difflib
import importlib.resources
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qwen2_jax.checkpoint.formats import gguf
from qwen2_jax.checkpoint.formats.protocol import Format
from qwen2_jax.checkpoint.formats.small_files import CONFIG, FolderFiles, SmallFiles, read_json, small_file
from qwen2_jax.checkpoint.formats.table import FORMATS, recognise
from qwen2_jax.config.model_config import HUB_IDS, ModelConfig
from qwen2_jax.config.presets import GGUF_TYPES, QUANTISED_HUB_IDS
from qwen2_jax.errors import CheckpointError, UserError
from qwen2_jax.files.atomic_folder import MARKER, UNFINISHED
from qwen2_jax.validate import short

DEMO = "demo"
ADAPTER_CONFIG = "adapter_config.json"  # of a PEFT folder
# Of a Hub repository; never pickles.
DOWNLOADED = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.txt", "*.jinja"]
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS = (".safetensors", *PICKLES)
GGUF_TYPE = re.compile(r"[A-Za-z0-9_]{2,12}")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class NotFound(CheckpointError, FileNotFoundError):
    """No checkpoint is there under this name."""

    __str__ = CheckpointError.__str__  # FileNotFoundError would print its arguments instead


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a checkpoint is. kind: name of its format (formats/table.py). path: a Path, or an epath.Path for gs://."""

    kind: str
    path: Any

    @property
    def format(self) -> Format:
        return FORMATS[self.kind]

    @property
    def files(self) -> SmallFiles:
        return self.format.files(self.path)

    def read_bytes(self, name: str) -> bytes | None:
        """The small file `name`, None where there is none."""
        return self.files.read_bytes(name)

    def read_json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the small file `name`, None where there is none."""
        return read_json(self.path, self.files, name)

    def small_files(self) -> list[str]:
        """Names of the files beside the weights that are copied when the checkpoint is converted or saved."""
        return self.files.names()

    @contextlib.contextmanager
    def folder_of_small_files(self) -> Iterator[Path]:
        """A local folder with the small files, for libraries that read nothing else; valid inside the `with` only."""
        if isinstance(self.path, Path) and self.path.is_dir():
            yield self.path
            return
        with tempfile.TemporaryDirectory() as folder:
            for name in self.small_files():
                file = small_file(Path(folder), name, str(self.path), writing=True)
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(self.read_bytes(name) or b"")
            yield Path(folder)


def read_config(source: Source) -> ModelConfig:
    """The model's architecture from the folder's config.json."""
    data = source.read_json(CONFIG)
    if data is None:
        raise NotFound(
            f"{source.path} ({source.format.title}) has no {CONFIG}; a checkpoint folder holds one beside its weights: "
            "put the model's into it"
        )
    try:
        return ModelConfig.from_hf(data)
    except UserError as why:
        raise CheckpointError(f"{source.path / CONFIG}: {why}") from None


def locate(name: str | Path | Source) -> Source:
    """Finds a checkpoint, downloading it if it is on the Hugging Face Hub.

    name: "demo" (bundled), a folder, a .gguf file, a gs:// path, a preset ("qwen2-7b-instruct"), a name of an official
    quantised checkpoint ("qwen2-7b-instruct-gptq-int4") or a Hub id ("Qwen/Qwen2-7B"); of a repository of GGUF files
    with a type: "qwen2-7b-instruct-gguf:q4_k_m", "Qwen/Qwen2-7B-Instruct-GGUF:q4_k_m".
    Raises CheckpointError that names what was searched for and what to give instead.
    """
    if isinstance(name, Source):
        return name
    text = str(name).strip()
    if not text:
        raise NotFound("the checkpoint's name is empty; give a folder, a preset such as qwen2-0.5b, a Hub id or 'demo'")
    if text == DEMO:
        with importlib.resources.as_file(importlib.resources.files("qwen2_jax.demo")) as folder:
            return _in_folder(Path(folder))
    if text.startswith("gs://"):
        return _in_bucket(text)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return _in_folder(folder)
    if folder.with_name(folder.name + UNFINISHED).is_dir():
        raise NotFound(f"{folder} is an unfinished conversion; run the conversion again")
    if folder.is_file():
        if found := recognise(folder):
            return Source(found.name, folder)
        raise CheckpointError(f"{folder} is no .gguf file; of another format, give the folder: {folder.parent}")
    repository, colon, kind = text.partition(":")
    hub_id = (HUB_IDS | QUANTISED_HUB_IDS).get(repository.lower())
    if hub_id is None and HUB_ID.fullmatch(repository) and not text.endswith(PICKLES):
        hub_id = repository
    if hub_id is None or isinstance(name, Path):
        raise NotFound(f"there is no folder {text!r} and no model of that name{_hint(text)}")
    if hub_id.endswith("-GGUF") or colon:
        return _downloaded_gguf(hub_id, kind, asked=text)
    return _in_folder(download(hub_id, asked=text))


def _downloaded_gguf(hub_id: str, kind: str, *, asked: str) -> Source:
    """The file of one type, such as q4_k_m, in a Hub repository of GGUF files, or the first of its parts."""
    if not GGUF_TYPE.fullmatch(kind):
        raise CheckpointError(
            f"{asked}: a repository of GGUF files has one of each type; put one behind a colon: "
            f"{asked.partition(':')[0]}:q4_k_m (or {', '.join(GGUF_TYPES)})"
        )
    ends = [f"[-.]{spelled}{part}.gguf" for spelled in (kind.lower(), kind.upper()) for part in ("", "-*-of-*")]
    folder = download(hub_id, asked=asked, patterns=[f"*{end}" for end in ends])
    files = sorted({file.name: file for end in ends for file in folder.glob(f"*{end}")}.items())
    if not files:
        raise NotFound(
            f"{hub_id} has no file of the type {kind!r} (*-{kind.lower()}.gguf), or it is not on this machine and the "
            "Hub cannot be reached; the repository's page lists its files"
        )
    return Source(gguf.FORMAT.name, files[0][1])


def _hint(text: str) -> str:
    """The nearest names, and beside a path the nearest folders."""
    known = [DEMO, *HUB_IDS, *HUB_IDS.values(), *QUANTISED_HUB_IDS]
    near = difflib.get_close_matches(text.lower(), known, 3, 0.6)
    folder = Path(text).expanduser()
    if not near and len(folder.parts) > 1 and folder.parent.is_dir():
        near = [
            str(folder.parent / n)
            for n in difflib.get_close_matches(folder.name, [p.name for p in folder.parent.iterdir()], 3)
        ]
    if near:
        return f"; did you mean {' or '.join(near)}?"
    if HUB_ID.fullmatch(text):
        return ""
    return "; give a folder, a Hub id such as Qwen/Qwen2-7B, 'demo' or a preset: " + ", ".join(sorted(HUB_IDS))


def _in_folder(folder: Path) -> Source:
    """The folder with its format. Raises CheckpointError that says why there is no checkpoint in it."""
    names = {file.name for file in folder.iterdir()}
    if MARKER in names or (folder.absolute().parent / MARKER).exists():
        raise CheckpointError(f"{folder} is an unfinished conversion; run the conversion again")
    for state in (folder, folder.absolute().parent):
        if (state / "about" / "data.json").exists() and (state / "state").is_dir():
            run = state.absolute().parent.parent
            raise CheckpointError(
                f"{folder} is the state of a training run, from which only that run continues; give the model that it "
                f"wrote: {run / 'hf'}, which is there when the run is done, or one that checkpoints.export_every made"
            )
    if ADAPTER_CONFIG in names and all(name.startswith("adapter_") for name in names if name.endswith(WEIGHTS)):
        base = (read_json(folder, FolderFiles(folder), ADAPTER_CONFIG) or {}).get("base_model_name_or_path")
        of = f" (of {short(base)[1:-1]})" if isinstance(base, str) and base else ""
        raise CheckpointError(
            f"{folder} holds LoRA adapters{of}, not a whole "
            "model: give the `hf` folder of the run that made them, or merge them into the base first "
            "(docs/lora.md: load_peft, lora.merge, save_hf); a LoRA run continues from them with --start.adapter"
        )
    if found := recognise(folder, names):
        return Source(found.name, folder)
    if (file := gguf.in_folder(folder, names)) is not None:
        return Source(gguf.FORMAT.name, file)
    if pickles := sorted(name for name in names if name.endswith(PICKLES)):
        raise CheckpointError(
            f"{folder} has its weights as pickle ({pickles[0]}), which can run code when read and is not supported; "
            "give a folder with .safetensors files (transformers' save_pretrained writes them)"
        )
    raise NotFound(f"{folder} holds no checkpoint: no .safetensors files, no Orbax checkpoint and no .gguf are in it")


def _in_bucket(text: str) -> Source:
    from etils import epath

    path = epath.Path(text)
    try:
        found = (path / CONFIG).exists()
    except (ImportError, OSError, ValueError) as why:
        raise CheckpointError(
            f"{text} cannot be opened ({why}); `pip install gcsfs` and `gcloud auth login` may be missing"
        ) from None
    if not found:
        raise NotFound(
            f"{text} has no {CONFIG}; give the folder of an Orbax checkpoint that `convert --to orbax` wrote"
        )
    return Source("orbax", path)


def download(hub_id: str, *, asked: str, patterns: Sequence[str] = DOWNLOADED) -> Path:
    """The repository's weights and text files in the Hub's cache; resumes, shows progress, works offline if cached.

    patterns: of the names of the files that are wanted.
    """
    from huggingface_hub import errors, snapshot_download

    instead = "give a local folder with its config.json and .safetensors files, or a .gguf file, instead"
    offline = f"no complete copy of {hub_id} is on this machine; {instead}"
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(patterns)))
    except errors.GatedRepoError:
        raise CheckpointError(
            f"{hub_id} asks for consent: accept its terms on the Hub, then run `hf auth login`"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotFound(
            f"there is no folder {asked!r} and {hub_id} is not on the Hugging Face Hub (or is private: `hf auth login`)"
            + _hint(hub_id)
        ) from None
    except errors.HFValidationError as why:
        raise NotFound(f"{hub_id!r} is no Hub id: {why}") from None
    except errors.LocalEntryNotFoundError:
        hint = "" if hub_id in (*HUB_IDS.values(), *QUANTISED_HUB_IDS.values()) else _hint(hub_id)
        raise NotFound(
            f"there is no folder {asked!r}, the Hugging Face Hub cannot be reached and {offline}{hint}"
        ) from None
    except (errors.HTTPError, errors.XetDownloadError, OSError) as why:
        reason = " ".join(str(why).split())[:200]
        raise CheckpointError(f"downloading {hub_id} failed ({reason}); run again to resume, or: {offline}") from None
