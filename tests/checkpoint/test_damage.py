# SPDX-License-Identifier: Apache-2.0
"""Whatever is wrong with a checkpoint is named, all at once, and nothing wrong is loaded."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import save_file

import checkpoint.hf_folders as hf
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.formats.safetensors import read_header


def header_of(path):
    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n]), raw[8 + n :]


def put_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def refused(folder) -> str:
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.load_params(folder)
    text = str(error.value)
    assert "\n" not in text
    return text


def test_everything_at_once(tmp_path):
    tensors = hf.random_tensors(hf.DENSE)
    del tensors["model.layers.0.mlp.up_proj.weight"]
    tensors["model.layers.1.self_attn.q_projj.weight"] = tensors.pop("model.layers.1.self_attn.q_proj.weight")
    tensors["model.norm.weight"] = np.ones(33, hf.BF16)
    tensors["model.layers.2.mlp.down_proj.weight"] = np.ones((32, 48), np.int8)
    text = refused(hf.write_folder(tmp_path / "a", hf.DENSE, tensors))
    assert "missing (2): model.layers.0.mlp.up_proj.weight, " in text
    assert "model.layers.1.self_attn.q_proj.weight (is it model.layers.1.self_attn.q_projj.weight?)" in text
    assert "unexpected (1): model.layers.1.self_attn.q_projj.weight" in text
    assert "model.norm.weight is [33], the config says [32]" in text
    assert (
        "model.layers.2.mlp.down_proj.weight in model.safetensors has the dtype 'I8'; supported: F32, F16, BF16" in text
    )


def test_truncated_tensors_are_named(dense):
    file = dense / "model.safetensors"
    header, data = header_of(file)
    keep = 200  # bytes of data
    put_header(file, header, data[:keep])
    text = refused(dense)
    cut = [name for name, entry in header.items() if name != "__metadata__" and entry["data_offsets"][1] > keep]
    assert len(cut) > 3
    for name in cut:
        assert f"{name} in model.safetensors is truncated" in text
    assert "missing" not in text


@pytest.mark.parametrize("size", [0, 5, 8, 100])
def test_file_cut_inside_its_header(dense, size):
    file = dense / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    text = refused(dense)
    assert f"model.safetensors ({size} bytes)" in text
    assert len(text) < 300  # not one line per tensor


def test_untied_model_without_head(tmp_path):
    tensors = hf.random_tensors(hf.TIED)
    text = refused(hf.write_folder(tmp_path / "a", hf.DENSE, tensors))
    assert "missing (1): lm_head.weight" in text
    assert "tie_word_embeddings" in text


def test_missing_shard_and_lying_index(tmp_path):
    folder = hf.write_folder(tmp_path / "a", hf.DENSE, hf.random_tensors(hf.DENSE), shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model-00002-of-00003.safetensors").unlink()
    text = refused(folder)
    assert "missing files (1): model-00002-of-00003.safetensors (an unfinished download?" in text
    assert "lm_head" not in text

    folder = hf.write_folder(tmp_path / "b", hf.DENSE, hf.random_tensors(hf.DENSE), shards=3)
    files = sorted(set(index["weight_map"].values()))
    name = "model.norm.weight"
    index["weight_map"][name] = files[(files.index(index["weight_map"][name]) + 1) % 3]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert f"not in that file (1): {name}" in refused(folder)


@pytest.mark.parametrize(
    "file", ["../a/model.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "model.bin", "a\\b.safetensors"]
)
def test_index_cannot_leave_the_folder(tmp_path, file):
    folder = hf.write_folder(tmp_path / "a", hf.DENSE, hf.random_tensors(hf.DENSE), shards=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    assert "only .safetensors files beside the index are read" in refused(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_unreadable_index(tmp_path, text):
    folder = hf.write_folder(tmp_path / "a", hf.DENSE, hf.random_tensors(hf.DENSE), shards=2)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(folder)


def entry(start=0, stop=12, shape=(3,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


HEADERS = {
    "holds a twice": b'{"a":%b,"a":%b}' % ((b'{"dtype":"F32","shape":[3],"data_offsets":[0,12]}',) * 2),
    "needs 16": {"a": entry(shape=(4,))},
    "has the shape [-3]": {"a": entry(shape=(-3,))},
    "has the shape [4611686018427387904]": {"a": entry(shape=(2**62,))},
    "has the shape 'x'": {"a": entry() | {"shape": "x"}},
    "has the shape [3.0]": {"a": entry(shape=(3.0,))},
    "has the data_offsets [0]": {"a": entry() | {"data_offsets": [0]}},
    "has the data_offsets [-12, 0]": {"a": entry(-12, 0)},
    "has the dtype 'F8_E4M3'": {"a": entry(dtype="F8_E4M3")},
    "has the dtype None": {"a": {}},
    "has the dtype ['F32']": {"a": entry() | {"dtype": ["F32"]}},
    "instead of an object": {"a": 3},
    "not a JSON object": [1, 2],
    "cannot be read": b"\xff\xfe",
    "cannot be read: ": b"[" * 100_000,
    "damaged": {"a": entry(), "b": entry()},  # overlapping: found by the official reader
    "damaged: ": {"a": entry(0, 8, (2,))},  # a gap at the end
}


@pytest.mark.parametrize("reason", HEADERS)
def test_hostile_header(tmp_path, reason):
    file = tmp_path / "model.safetensors"
    put_header(file, HEADERS[reason], b"\0" * 12)
    header = read_header(file)
    assert any(reason in problem for problem in header.problems), header.problems


def test_random_bytes_never_crash_the_reader(tmp_path, dense):
    good = (dense / "model.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    file = tmp_path / "x.safetensors"
    for _ in range(150):
        raw = bytearray(good)
        for at in rng.integers(0, 400, rng.integers(1, 6)):
            raw[at] = rng.integers(256)
        file.write_bytes(raw[: rng.integers(len(raw) // 2, len(raw) + 1)])
        header = read_header(file)
        size = file.stat().st_size
        assert all(info.start + info.nbytes <= size for info in header.tensors.values())


def test_huge_header_length_is_not_allocated(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    assert "does not begin like a safetensors file" in read_header(file).problems[0]


def test_pickles_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(hf.DENSE))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(checkpoint.CheckpointError, match="pickle"):
        checkpoint.load_params(tmp_path)


def test_verify_names_the_damaged_tensor(tmp_path, dense):
    checkpoint.convert(dense, tmp_path / "a", "hf")
    file = tmp_path / "a" / "model.safetensors"
    header, data = header_of(file)
    name = "model.layers.1.mlp.gate_proj.weight"
    at = header[name]["data_offsets"][0] + 5
    put_header_raw = file.read_bytes()[: -len(data)]
    file.write_bytes(put_header_raw + data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    (tmp_path / "a" / "merges.txt").unlink()
    report = checkpoint.verify(tmp_path / "a")
    assert report.damaged == (
        f"{name}: its bytes have changed",
        "merges.txt: is not in the folder",
        "tokenizer.json: its bytes have changed",
    )
    assert not checkpoint.verify(dense).hashed


def test_verify_names_the_damaged_array_of_an_orbax_folder(tmp_path):
    """A bit is flipped in every file of the arrays in turn: tensors are named, or the folder's own index is broken."""
    source = hf.write_folder(tmp_path / "hf", hf.TIED, hf.random_tensors(hf.TIED))
    checkpoint.convert(source, tmp_path / "a", "orbax")
    files = [
        f for f in (tmp_path / "a" / "state").rglob("*") if f.is_file() and "/d/" in str(f) and f.stat().st_size > 1000
    ]
    assert files
    flagged = set()
    for file in files:
        good = file.read_bytes()
        for at in (len(good) // 3, 2 * len(good) // 3):
            file.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
            try:
                report = checkpoint.verify(tmp_path / "a")
            except checkpoint.CheckpointError as why:
                assert "damaged" in str(why)  # noqa: PT017
            else:
                assert report.damaged
                flagged |= {line.split(":")[0] for line in report.damaged}
        file.write_bytes(good)
    assert flagged
    assert flagged <= set(hf.tensors_of(hf.TIED))
    assert checkpoint.verify(tmp_path / "a").damaged == ()


def test_orbax_folder_of_another_model(tmp_path, dense):
    checkpoint.convert(dense, tmp_path / "a", "orbax")
    (tmp_path / "a" / "config.json").write_text(
        json.dumps(hf.DENSE | {"num_hidden_layers": 4, "intermediate_size": 64})
    )
    text = refused(tmp_path / "a")
    assert "missing (12): stacks.3.blocks.0." in text
    assert "stacks.0.blocks.0.mlp.gate_FD is [1, 48, 32], the config says [1, 64, 32]" in text


def test_incomplete_orbax_folder(tmp_path, dense):
    checkpoint.convert(dense, tmp_path / "a", "orbax")
    shutil.rmtree(tmp_path / "a" / "state")
    assert str(tmp_path / "a") in refused(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama"}', '{"model_type": "qwen2"}'])
def test_unusable_config(dense, text):
    (dense / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config|model_type"):
        checkpoint.load_params(dense)


def test_damaged_manifest(tmp_path, dense):
    checkpoint.convert(dense, tmp_path / "a", "hf")
    for text in ("{", "[]", '{"version": 9}', '{"version": 1}', '{"version": 1, "tensors": {"a": {}}, "files": {}}'):
        (tmp_path / "a" / "manifest.json").write_text(text)
        with pytest.raises(checkpoint.CheckpointError, match=r"manifest\.json"):
            checkpoint.verify(tmp_path / "a")


def test_tensor_twice_in_two_files(tmp_path, dense):
    (dense / "model.safetensors").rename(dense / "one.safetensors")
    save_file({"model.norm.weight": np.ones(32, hf.BF16)}, dense / "two.safetensors")
    assert "given twice (1): model.norm.weight in one.safetensors and two.safetensors" in refused(dense)
