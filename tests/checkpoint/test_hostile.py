# SPDX-License-Identifier: Apache-2.0
"""Folders that lie: nothing is written outside of the new folder, and every refusal is one line."""

import json
import shutil

import numpy as np
import pytest

import checkpoint.hf_folders as hf
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.checkpoint.formats.safetensors_layout import Layout
from qwen2_jax.errors import CheckpointError

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
