# SPDX-License-Identifier: Apache-2.0
"""Folders that lie: nothing is written outside of the new folder, and every refusal is one line."""

import json
import shutil

import numpy as np
import pytest

import checkpoint.hf_folders as hf
from mutations import damaged, mutated_json, right_or_refused
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.formats.hf_folder import HfFolder
from qwen2_jax.checkpoint.formats.safetensors_layout import Layout
from qwen2_jax.checkpoint.formats.small_files import FolderFiles
from qwen2_jax.checkpoint.manifest import compare
from qwen2_jax.checkpoint.transfer.write import Writing, write_hf
from qwen2_jax.errors import CheckpointError, UserError
from qwen2_jax.files.json_text import parse_json_object

BUFFER = "model.layers.0.self_attn.rotary_emb.inv_freq"
ONE = hf.TIED | {"num_hidden_layers": 1}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A Hugging Face folder of two files with a head that repeats the embedding and a buffer; and its Orbax copy."""
    tensors = hf.random_tensors(ONE)
    tensors |= {"lm_head.weight": tensors["model.embed_tokens.weight"], BUFFER: np.arange(4, dtype=np.float32)}
    folder = tmp_path_factory.mktemp("good")
    hf.write_folder(folder / "hf", ONE, tensors, shards=2)
    checkpoint.convert(folder / "hf", folder / "orbax", "orbax")
    return folder


@pytest.fixture
def orbax(good, tmp_path):
    return shutil.copytree(good / "orbax", tmp_path / "orbax")


def change_layout(folder, change) -> None:
    file = folder / "safetensors_layout.json"
    layout = json.loads(file.read_text())
    change(layout)
    file.write_text(json.dumps(layout))


def names_a_file(target):
    """A layout that has `target` written, with bytes of the attacker's choice."""
    payload = b"\nimport os  \n"
    entry = {"dtype": "F32", "shape": [len(payload) // 4], "data_offsets": [0, len(payload)]}

    def change(layout):
        layout["headers"][target] = json.dumps({"x.rotary_emb.inv_freq": entry})
        layout["extras"]["x.rotary_emb.inv_freq"] = payload.hex()

    return change


@pytest.mark.parametrize("target", ["../../evil.pth", "{tmp}/evil.safetensors", "..", "a/b.safetensors", "x.py", "\0"])
def test_a_layout_names_no_file_elsewhere(orbax, tmp_path, target, capsys):
    target = target.format(tmp=tmp_path)
    change_layout(orbax, names_a_file(target))
    before = set(tmp_path.rglob("*"))
    assert main(["convert", str(orbax), str(tmp_path / "sub" / "out"), "--to", "hf"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert "safetensors_layout.json names " in error
    assert "only .safetensors files of the new folder are written" in error
    assert set(tmp_path.rglob("*")) == before


DAMAGED = {
    "extras must map": lambda d: d.update(extras=[]),
    "the index must be a text": lambda d: d.update(index=7),
    "headers must map": lambda d: d.update(headers={"model.safetensors": 3}),
    "a layout has headers": lambda d: d.update(more=1),
    "it must name files": lambda d: d.update(headers={}),
    "other tensors or files than its headers": lambda d: d.update(index='{"weight_map": {}}'),
    "the index in": lambda d: d.update(index='{"weight_map": {"x": "../x.safetensors"}}'),
    "no header has 'x'": lambda d: d["aliases"].update(x="lm_head.weight"),
    "are not hexadecimal": lambda d: d["extras"].update({BUFFER: "xy"}),
    "is no buffer of rotary frequencies": lambda d: d["extras"].update({BUFFER: "00"}),
    "has the dtype 'I8'": lambda d: change_header(d, lambda h: next(iter(h.values())).update(dtype="I8")),
    "the tensor before it ends at": lambda d: change_header(d, lambda h: h.pop(next(iter(h)))),
    "is in two files": lambda d: change_header(d, lambda h: h.update(other_header(d))),
    "is given twice": lambda d: d["headers"].update({min(d["headers"]): '{"a":%s,"a":%s}' % ((EMPTY,) * 2)}),
    "the header is not JSON": lambda d: d["headers"].update({min(d["headers"]): "{"}),
}  # fmt: skip
EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def change_header(layout, change) -> None:
    file = min(layout["headers"])
    header = json.loads(layout["headers"][file])
    header.pop("__metadata__")
    change(header)
    layout["headers"][file] = json.dumps(header)


def other_header(layout):
    header = json.loads(layout["headers"][max(layout["headers"])])
    return {name: json.loads(EMPTY) for name in header if name != "__metadata__"}


@pytest.mark.parametrize("reason", DAMAGED)
def test_a_damaged_layout_is_named(good, reason):
    layout = json.loads((good / "orbax" / "safetensors_layout.json").read_text())
    DAMAGED[reason](layout)
    with pytest.raises(CheckpointError) as caught:
        Layout.from_json(layout, "safetensors_layout.json")
    text = str(caught.value)
    assert text.startswith("safetensors_layout.json is damaged (") and reason in text
    assert text.endswith("remove it to have the files laid out anew") and len(text) < 500


def test_commands_on_a_damaged_layout(orbax, tmp_path, capsys):
    change_layout(orbax, lambda d: d.update(extras=[]))
    assert main(["convert", str(orbax), str(tmp_path / "out"), "--to", "hf"]) == 2
    assert main(["verify", str(orbax)]) == 1
    for line in capsys.readouterr().err.splitlines():
        assert "safetensors_layout.json is damaged (extras must map names to texts); remove it" in line
    (orbax / "safetensors_layout.json").unlink()
    assert main(["convert", str(orbax), str(tmp_path / "out"), "--to", "hf"]) == 0


def test_a_manifest_names_no_file_elsewhere(good, tmp_path):
    """verify reads what the manifest lists: /dev/zero never ends."""
    checkpoint.convert(good / "hf", tmp_path / "a", "hf")
    file = tmp_path / "a" / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in ("/dev/zero", "../hf/config.json", "a/b"):
        file.write_text(json.dumps(manifest | {"files": {name: "0" * 64}}))
        with pytest.raises(CheckpointError, match=r"manifest\.json names .*small files lie in its folder"):
            checkpoint.verify(tmp_path / "a")


def whole_file(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def parts_of(file) -> tuple[dict, bytes]:
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def values_of(tensors) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in tensors.stream(list(tensors.infos))}


@pytest.fixture(scope="module")
def model(good):
    """What the good folder holds: declarations, tensors, their bytes."""
    opened = checkpoint.open_checkpoint(good / "hf")
    return opened, values_of(opened.tensors)


def test_mutated_headers(mutations, good, model, tmp_path):
    """The header of one of two files, the bytes of the file, or the index: the model's own tensors, or one line."""
    opened, values = model
    folder = shutil.copytree(good / "hf", tmp_path / "hf")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    file = min(folder.glob("*.safetensors"))
    header, data = parts_of(file)
    content = file.read_bytes()
    sizes = {name: (info.dtype, info.shape) for name, info in opened.tensors.infos.items()}

    def used():
        again = HfFolder(folder).check(names.table(opened.specs), tied=True)
        assert {name: (info.dtype, info.shape) for name, info in again.infos.items()} == sizes
        Layout.from_json(json.loads(json.dumps(again.layout().to_json())), "layout")  # what a conversion keeps is good
        return values_of(again)

    assert used() == values
    for seed in mutations:
        match seed % 3:
            case 0:
                file.write_bytes(whole_file(mutated_json(seed, header), data))
            case 1:
                file.write_bytes(damaged(seed, content))
            case _:
                (folder / "model.safetensors.index.json").write_bytes(mutated_json(seed, index))
        right_or_refused(seed, used)
        file.write_bytes(content)
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_mutated_layouts(mutations, good, model, tmp_path):
    """What is accepted for these tensors is written, and the new folder is one that reads back with the same bytes."""
    opened, values = model
    layout = json.loads((good / "orbax" / "safetensors_layout.json").read_text())
    table = names.table(opened.specs)

    def used(content):
        found = Layout.from_json(parse_json_object(content, "layout", CheckpointError), "layout")
        if not found.serves(opened.tensors.infos):
            return "laid out anew"
        write_hf(tmp_path / "out", Writing(opened.tensors, table, None), found, {})
        again = HfFolder(tmp_path / "out").check(table, tied=True)
        assert values_of(again) == values
        return "written"

    assert used(json.dumps(layout).encode()) == "written"
    before = set(tmp_path.parent.rglob("*")) - set((tmp_path / "out").rglob("*"))
    for seed in mutations:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        inner = json.loads(json.dumps(layout))
        file = max(inner["headers"]) if seed % 2 else min(inner["headers"])
        match seed % 3:
            case 0:
                content = mutated_json(seed, layout)
            case 1:
                inner["headers"][file] = mutated_json(seed, json.loads(inner["headers"][file])).decode(errors="replace")
                content = json.dumps(inner).encode()
            case _:
                inner["index"] = mutated_json(seed, json.loads(inner["index"])).decode(errors="replace")
                content = json.dumps(inner).encode()
        right_or_refused(seed, lambda content=content: used(content))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    assert set(tmp_path.parent.rglob("*")) == before - {tmp_path / "out"}


def test_mutated_manifests(mutations, good, model, tmp_path):
    """An accepted manifest has every right hash, or finds damage where none is: never a wrong 'every hash is right'."""
    opened, _ = model
    checkpoint.convert(good / "hf", tmp_path / "a", "hf")
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    files = FolderFiles(tmp_path / "a")
    for seed in mutations:
        content = mutated_json(seed, manifest)
        (tmp_path / "a" / "manifest.json").write_bytes(content)
        found = right_or_refused(
            seed, lambda: compare(tmp_path / "a", files, opened.tensors, opened.layout)
        )  # fmt: skip
        if not isinstance(found, UserError) and not found.damaged:
            same = json.loads(content)
            for name, row in manifest["tensors"].items():
                kept = same["tensors"][name]
                assert kept == row or (name not in opened.tensors.infos and kept["sha256"] == row["sha256"])
            assert same["tensors"].keys() == manifest["tensors"].keys()
            assert same["files"].items() <= manifest["files"].items()
