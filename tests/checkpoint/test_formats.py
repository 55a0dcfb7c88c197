# SPDX-License-Identifier: Apache-2.0
"""A format is one entry of the table: two that exist only here are loaded, converted, verified and refused like others.

"packed" is a folder whose matrices are 4-bit integers in groups, in GPTQ's layout: four tensors for a weight. "onefile"
is a single file with config and tokenizer in it, in which gate and up are the halves of one tensor.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import checkpoint.hf_folders as hf
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import sources
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.checkpoint.formats import names, stored_tensor, table
from qwen2_jax.checkpoint.formats.collected_errors import CollectedErrors
from qwen2_jax.checkpoint.formats.file_tensors import FileTensors
from qwen2_jax.checkpoint.formats.hf_folder import HfFolder
from qwen2_jax.checkpoint.formats.protocol import Format
from qwen2_jax.checkpoint.formats.safetensors import DTYPES, TensorInFile
from qwen2_jax.checkpoint.formats.small_files import CONFIG, FolderFiles
from qwen2_jax.checkpoint.formats.stored_tensor import DecodedTensor, NotInGroups
from qwen2_jax.checkpoint.transfer import load

GROUP = 16
QUANTISED = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Packed4(NotInGroups):
    """w[f, k] = scales[g_idx[k], f] * (q[k, f] - 8), in any order of groups."""

    row_multiple, kind = 8, "packed4"

    def __init__(self):
        self.asked = []

    def decode(self, parts, rows):
        self.asked.append(rows)
        with (
            parts["qweight"].mapped() as qweight,
            parts["scales"].mapped() as scales,
            parts["g_idx"].mapped() as g_idx,
        ):
            words = qweight[:, rows].view(np.uint32)
            q = words[:, None] >> np.arange(0, 32, 4, dtype=np.uint32)[None, :, None] & 15
            q = q.reshape(-1, q.shape[-1]).astype(np.float32)
            return (scales[:, rows].astype(np.float32)[g_idx] * (q - 8)).T


class PackedFolder(HfFolder):
    dtypes = DTYPES | {"I32": np.dtype(np.int32)}
    decoder = Packed4()

    def weights(self, in_files):
        found = dict(in_files)
        for name in in_files:
            if name.endswith(".qweight"):
                base = name.removesuffix(".qweight")
                roles = ("qweight", "scales", "g_idx", "qzeros")
                if not all(f"{base}.{role}" in in_files for role in roles):
                    continue  # `check` says what is missing
                parts = {role: found.pop(f"{base}.{role}") for role in roles}
                words, outputs = parts["qweight"].shape
                dtype = np.dtype(np.float32)
                found[f"{base}.weight"] = DecodedTensor(dtype, (outputs, words * 8), parts, self.decoder)
        return found

    def layout(self):
        return None


class PackedFiles(FolderFiles):
    """The config of what the weights become."""

    def read_bytes(self, name, limit=None):
        content = super().read_bytes(name, limit)
        if name != CONFIG or content is None:
            return content
        return json.dumps({k: v for k, v in json.loads(content).items() if k != "quantization_config"}).encode()


def is_packed(path, names):
    return CONFIG in names and "quantization_config" in json.loads((path / CONFIG).read_text())


def open_packed(path, files, specs, *, tied):
    return PackedFolder(path).check(names.table(specs), tied=tied)


class OneFile(FileTensors):
    def __init__(self, path, specs):
        super().__init__()
        self.path = path
        header = json.loads(path.read_bytes().split(b"\n", 1)[0])
        for name, (start, shape) in header["tensors"].items():
            tensor = TensorInFile(hf.BF16, tuple(shape), path, start)
            if name.endswith("gate_up_proj.weight"):
                rows, width = shape
                for i, half in enumerate(("gate_proj", "up_proj")):
                    at = start + i * tensor.nbytes // 2
                    info = TensorInFile(hf.BF16, (rows // 2, width), path, at)
                    self.infos[name.replace("gate_up_proj", half)] = info
            else:
                self.infos[name] = tensor
        errors = CollectedErrors(str(path))
        want = {name: slot.shape for name, slot in names.table(specs).items()}
        errors.compare({name: info.shape for name, info in self.infos.items()}, want)
        errors.raise_any()

    def layout(self):
        return None


class FilesInside:
    def __init__(self, path):
        self.files = json.loads(path.read_bytes().split(b"\n", 1)[0])["files"]

    def names(self):
        return list(self.files)

    def read_bytes(self, name, limit=None):
        return self.files[name].encode() if name in self.files else None


PACKED = Format("packed", "4 bits in groups", is_packed, open_packed, PackedFiles)
ONE_FILE = Format(
    "onefile", "one file", lambda path, names: Path(path).suffix == ".one",
    lambda path, files, specs, *, tied: OneFile(path, specs), FilesInside,
)  # fmt: skip


@pytest.fixture(autouse=True)
def formats(monkeypatch):
    extended = {"packed": PACKED, "onefile": ONE_FILE, **table.FORMATS}
    monkeypatch.setattr(table, "FORMATS", extended)
    monkeypatch.setattr(sources, "FORMATS", extended)
    monkeypatch.setattr(PackedFolder, "decoder", Packed4())


def packed_folder(folder: Path, config: dict) -> tuple[Path, dict[str, np.ndarray]]:
    """The folder, and the float32 tensors that it means."""
    rng = np.random.default_rng(0)
    stored, means = {}, {}
    for name, value in hf.random_tensors(config).items():
        if not any(f".{kind}.weight" in name for kind in QUANTISED):
            stored[name], means[name] = value, value.astype(np.float32)
            continue
        outputs, inputs = value.shape
        q = rng.integers(0, 16, (inputs, outputs), np.uint32)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)[None, :, None]
        words = (q.reshape(-1, 8, outputs) << shifts).sum(1, dtype=np.uint32)
        scales = rng.random((inputs // GROUP, outputs)).astype(np.float16)
        g_idx = rng.permutation(inputs).astype(np.int32) // GROUP  # act-order
        base = name.removesuffix(".weight")
        zeros = np.full((inputs // GROUP, outputs // 8), 0x77777777, np.int32)
        stored |= {
            f"{base}.qweight": words.view(np.int32), f"{base}.scales": scales, f"{base}.g_idx": g_idx,
            f"{base}.qzeros": zeros,
        }  # fmt: skip
        means[name] = np.ascontiguousarray((scales.astype(np.float32)[g_idx] * (q.astype(np.float32) - 8)).T)
    hf.write_folder(folder, config, {})
    save_file(stored, folder / "model.safetensors")
    (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    return folder, means


def one_file(path: Path, config: dict, without: str = "") -> tuple[Path, dict[str, np.ndarray]]:
    means = hf.random_tensors(config)
    stored = {}
    for name, value in means.items():
        if "up_proj" in name or name == without:
            continue
        if "gate_proj" in name:
            up = means[name.replace("gate_proj", "up_proj")]
            name, value = name.replace("gate_proj", "gate_up_proj"), np.concatenate([value, up])
        stored[name] = value
    start, rows = 1 << 14, {}
    for name, value in stored.items():
        rows[name] = (start, value.shape)
        start += value.nbytes
    files = {CONFIG: json.dumps(config), "tokenizer.json": "{}"}
    header = json.dumps({"files": files, "tensors": rows}).encode() + b"\n"
    assert len(header) <= 1 << 14
    path.write_bytes(header.ljust(1 << 14) + b"".join(value.tobytes() for value in stored.values()))
    return path, means


@pytest.mark.parametrize("config", [hf.DENSE, hf.SPARSE], ids=["dense", "sparse"])
def test_several_tensors_per_weight(tmp_path, config, monkeypatch):
    """Loaded in blocks of rows, converted to both formats: the numbers that the packed integers mean."""
    if config is hf.SPARSE:
        config = config | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 48}
    folder, means = packed_folder(tmp_path / "packed", config)
    hf.write_folder(tmp_path / "plain", config | {"torch_dtype": "float32"}, means)
    monkeypatch.setattr(stored_tensor, "BLOCK", 400)
    opened = checkpoint.open_checkpoint(folder)
    assert opened.source.kind == "packed"
    packed = {name for name, info in opened.tensors.infos.items() if info.kind == "packed4"}
    assert packed == {name for name in means if any(f".{kind}.weight" in name for kind in QUANTISED)}
    for unroll in (False, True):
        params = checkpoint.load_params(folder, dtype="float32", unroll=unroll)
        jax.tree.map(np.testing.assert_array_equal, params, checkpoint.load_params(tmp_path / "plain", unroll=unroll))
    asked = PackedFolder.decoder.asked
    assert all(rows.start % 8 == 0 and rows.stop - rows.start <= 400 // 32 // 8 * 8 + 16 for rows in asked)
    for to in ("hf", "orbax"):
        out = checkpoint.convert(folder, tmp_path / to, to, dtype="float32")
        assert "quantization_config" not in json.loads((out / CONFIG).read_text())
        for name, value in checkpoint.open_checkpoint(out).tensors.stream(list(means)):
            np.testing.assert_array_equal(value, means[name], err_msg=name)
        assert checkpoint.verify(out).damaged == ()
    assert not checkpoint.verify(folder).hashed


def test_a_slice_decodes_its_rows_only(tmp_path):
    """Of any shape that the parameter has: rows of the file, not of the parameter, are what is decoded."""
    folder, means = packed_folder(tmp_path / "packed", hf.DENSE)
    name = "model.layers.1.self_attn.q_proj.weight"
    tensor = checkpoint.open_checkpoint(folder).tensors.infos[name]
    want = means[name].reshape(4, 8, 32)
    for index in ((slice(2, 3), slice(0, 8), slice(0, 32)), (slice(1, 4), slice(3, 5), slice(8, 16))):
        out = np.empty(want[index].shape, np.float32)
        PackedFolder.decoder.asked.clear()
        nbytes = tensor.read_into(out, index, want.shape)
        np.testing.assert_array_equal(out, want[index])
        assert PackedFolder.decoder.asked == [slice(index[0].start * 8, index[0].stop * 8)]
        assert nbytes == tensor.stored_bytes * (index[0].stop - index[0].start) // 4
    out = np.empty((5, 3), np.float32)
    tensor.read_into(out, (slice(7, 12), slice(1, 4)), tensor.shape)
    np.testing.assert_array_equal(out, means[name][7:12, 1:4])


def test_damage_of_a_packed_folder_has_its_names(tmp_path):
    folder, _ = packed_folder(tmp_path / "packed", hf.DENSE)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(checkpoint.CheckpointError, match=r"q_proj\.scales in .* truncated: its last 36 of 128"):
        checkpoint.load_params(folder)


def test_config_and_tokenizer_inside_a_file(tmp_path, capsys):
    file, means = one_file(tmp_path / "model.one", hf.DENSE)
    source = checkpoint.locate(file)
    assert (source.kind, checkpoint.read_config(source).num_hidden_layers) == ("onefile", 3)
    with source.folder_of_small_files() as folder:
        assert (folder / "tokenizer.json").read_text() == "{}"
    out = checkpoint.convert(file, tmp_path / "hf", "hf")
    assert (out / "tokenizer.json").read_text() == "{}"
    for name, value in checkpoint.open_checkpoint(out).tensors.stream(list(means)):
        assert value.tobytes() == means[name].tobytes(), name
    params = load.read_params(checkpoint.open_checkpoint(file).tensors, checkpoint.open_checkpoint(out).specs,
                              load.param_shardings(None))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, params, checkpoint.load_params(out))
    assert main(["inspect", str(file)]) == 0
    assert "one file" in capsys.readouterr().out


def test_what_is_missing_in_a_file_is_named(tmp_path):
    file, _ = one_file(tmp_path / "model.one", hf.DENSE, without="model.norm.weight")
    with pytest.raises(checkpoint.CheckpointError, match=r"missing \(1\): model\.norm\.weight"):
        checkpoint.load_params(file)
