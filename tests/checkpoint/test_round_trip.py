# SPDX-License-Identifier: Apache-2.0
"""Hugging Face -> Orbax -> Hugging Face gives the very same files, and both load to the same parameters."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoint.hf_folders as hf
from few import slow
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.formats import names
from qwen2_jax.checkpoint.formats.hf_folder import HfFolder
from qwen2_jax.checkpoint.transfer import load
from qwen2_jax.config import ModelConfig
from qwen2_jax.model import declare
from qwen2_jax.weights.params import leaves


def by_expert(name: str):
    """Experts of one layer in three dtypes, norms in float32, the rest in bfloat16."""
    if "experts." in name:
        return (hf.BF16, hf.F16, hf.F32)[int(name.split("experts.")[1].split(".")[0]) % 3]
    return hf.F32 if "norm" in name else hf.BF16


def by_layer(name: str):
    return hf.F32 if "layers.1." in name else hf.F16


CASES = {
    "dense": (hf.DENSE, hf.BF16, 1),
    "tied, sharded, float16": (hf.TIED, hf.F16, 3),
    "sparse, sharded": (hf.SPARSE, hf.BF16, 4),
    "alternating, float32": (hf.ALTERNATING, hf.F32, 1),
    "sparse, mixed": (hf.SPARSE, by_expert, 2),
    "dense, mixed": (hf.DENSE, by_layer, 1),
    "linear score": (hf.LINEAR_SCORE, hf.BF16, 1),
    "two-layer score, sharded": (hf.DEEP_SCORE, hf.BF16, 3),
}


QUICK = ("tied, sharded, float16", "sparse, mixed", "two-layer score, sharded")


@pytest.mark.parametrize("case", [case if case in QUICK else slow(case)[0] for case in CASES])
def test_bytes_survive(tmp_path, case):
    config, dtype, shards = CASES[case]
    source = hf.write_folder(tmp_path / "a", config, hf.random_tensors(config, dtype), shards=shards)
    checkpoint.convert(source, tmp_path / "b", "orbax")
    checkpoint.convert(tmp_path / "b", tmp_path / "c", "hf")
    assert hf.files_of(source) == hf.files_of(tmp_path / "c")
    for folder in ("b", "c"):
        report = checkpoint.verify(tmp_path / folder)
        assert report.hashed
        assert report.damaged == ()
        assert report.tensors == len(hf.tensors_of(config))
    manifests = [json.loads((tmp_path / folder / "manifest.json").read_text())["tensors"] for folder in "bc"]
    assert manifests[0] == manifests[1]

    for unroll in (False, True):
        ours, theirs = (checkpoint.load_params(tmp_path / f, dtype="float32", unroll=unroll) for f in "ab")
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize(
    "config",
    [hf.DENSE, hf.TIED, hf.SPARSE, hf.ALTERNATING, hf.LINEAR_SCORE, hf.DEEP_SCORE],
    ids=["dense", "tied", "sparse", "alternating", "linear score", "two-layer score"],
)
@pytest.mark.parametrize("unroll", [False, True])
def test_every_tensor_goes_where_it_is_declared(tmp_path, config, unroll):
    tensors = hf.random_tensors(config)
    params = checkpoint.load_params(hf.write_folder(tmp_path / "a", config, tensors), unroll=unroll)
    specs = declare(ModelConfig.from_hf(config), unroll=unroll)[1]
    assert {path: spec.shape for path, spec in leaves(specs)} == {path: value.shape for path, value in leaves(params)}
    seen = set()
    for name, slot in names.table(specs).items():
        value = np.asarray(names.get(params, slot.path))
        value = value if slot.repeat is None else value[slot.repeat]
        value = value if slot.expert is None else value[slot.expert]
        assert value.dtype == hf.BF16
        np.testing.assert_array_equal(value.reshape(-1), tensors[name].reshape(-1), err_msg=name)
        seen.add(name)
    assert seen == tensors.keys()


@pytest.mark.parametrize("config", [hf.DENSE, hf.ALTERNATING], ids=["dense", "alternating"])
def test_unrolled_declarations_are_those_of_the_unrolled_model(config):
    model = ModelConfig.from_hf(config)
    assert names.unrolled(declare(model)[1]) == declare(model, unroll=True)[1]


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize("unroll", [False, True])
def test_saved_parameters_come_back(tmp_path, to, unroll):
    config = ModelConfig.from_hf(hf.ALTERNATING)
    source = hf.write_folder(tmp_path / "source", hf.ALTERNATING, hf.random_tensors(hf.ALTERNATING, hf.F32))
    params = checkpoint.load_params(source, dtype="float32", unroll=unroll)
    save = {"hf": checkpoint.save_hf, "orbax": checkpoint.save_orbax}[to]
    assert save(tmp_path / "a", config, params) == tmp_path / "a"
    again = checkpoint.load_params(tmp_path / "a", unroll=unroll)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    assert checkpoint.read_config(checkpoint.locate(tmp_path / "a")).dtype == "float32"
    assert checkpoint.verify(tmp_path / "a").damaged == ()


def test_saved_folder_is_what_transformers_expects(tmp_path, dense):
    params = checkpoint.load_params(dense)
    config = checkpoint.read_config(checkpoint.locate(dense))
    checkpoint.save_hf(tmp_path / "a", config, params, tokenizer_files_from=dense, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    want = hf.random_tensors(hf.DENSE)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in want.values())
    assert set(index["weight_map"]) == set(want)
    assert len(set(index["weight_map"].values())) > 2
    for file in set(index["weight_map"].values()):
        for name, value in load_file(tmp_path / "a" / file).items():
            assert index["weight_map"][name] == file
            assert value.tobytes() == want[name].tobytes()
            assert value.shape == want[name].shape
    for name in ("config.json", "tokenizer.json", "generation_config.json", "merges.txt", "LICENSE"):
        assert (tmp_path / "a" / name).read_bytes() == (dense / name).read_bytes()


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_dtype_is_cast_on_the_way(tmp_path, dense, to):
    checkpoint.convert(dense, tmp_path / "a", to, dtype="float16")
    assert json.loads((tmp_path / "a" / "config.json").read_text()) == hf.DENSE | {"torch_dtype": "float16"}
    opened = checkpoint.open_checkpoint(tmp_path / "a")
    for name, value in opened.tensors.stream(list(opened.tensors.infos)):
        np.testing.assert_array_equal(value, hf.random_tensors(hf.DENSE)[name].astype(np.float16))
    assert checkpoint.verify(tmp_path / "a").damaged == ()


def test_loading_casts_as_numpy_does(tmp_path):
    tensors = hf.random_tensors(hf.TIED, by_layer)
    hf.write_folder(tmp_path / "a", hf.TIED, tensors)
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "orbax")
    for folder, dtype in itertools.product("ab", ["bfloat16", "float16", "float32"]):
        params = checkpoint.load_params(tmp_path / folder, dtype=dtype)
        for name, slot in names.table(declare(ModelConfig.from_hf(hf.TIED))[1]).items():
            value = names.get(params, slot.path)
            assert value.dtype == jnp.dtype(dtype)
            value = np.asarray(value if slot.repeat is None else value[slot.repeat])
            np.testing.assert_array_equal(
                value.reshape(slot.shape), tensors[name].astype(jnp.dtype(dtype)), err_msg=name
            )


def test_layers_filled_on_the_device_are_the_same(dense):
    opened = checkpoint.open_checkpoint(dense)
    place = load.param_shardings(None)
    host = load.read_params(opened.tensors, opened.specs, place)
    device = load.read_params(opened.tensors, opened.specs, place, stage_bytes=0)
    jax.tree.map(np.testing.assert_array_equal, host, device)


def test_orbax_itself_reads_the_folder(tmp_path, dense):
    from orbax.checkpoint import v1 as ocp

    checkpoint.convert(dense, tmp_path / "a", "orbax")
    params = checkpoint.load_params(dense, unroll=True)
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=place), _text_keys(params))
    jax.tree.map(np.testing.assert_array_equal, _text_keys(params), ocp.load(tmp_path / "a", abstract))


def _text_keys(tree):
    return {str(k): _text_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def test_tied_head_in_the_file(tmp_path):
    """A tied model may carry its head all the same: accepted if equal, written again, refused if it differs."""
    tensors = hf.random_tensors(hf.TIED)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(4, dtype=np.float32)
    source = hf.write_folder(tmp_path / "a", hf.TIED, tensors, shards=2)
    assert "head_VD" not in checkpoint.load_params(source)
    checkpoint.convert(source, tmp_path / "b", "orbax")
    checkpoint.convert(tmp_path / "b", tmp_path / "c", "hf")
    assert hf.files_of(source) == hf.files_of(tmp_path / "c")
    assert checkpoint.verify(tmp_path / "c").damaged == ()

    tensors["lm_head.weight"][5, 7] += 1
    with pytest.raises(checkpoint.CheckpointError, match="lm_head.weight differs from model.embed_tokens.weight"):
        checkpoint.load_params(hf.write_folder(tmp_path / "d", hf.TIED, tensors))


def test_model_bytes_needs_no_weights(dense):
    (dense / "model.safetensors").write_bytes(b"")
    source = checkpoint.locate(dense)
    params = sum(int(np.prod(shape)) for shape in hf.tensors_of(hf.DENSE).values())
    assert checkpoint.model_bytes(source) == 2 * params
    assert checkpoint.model_bytes(source, "float32") == 4 * params


def test_progress_counts_to_the_end(tmp_path, dense):
    calls = []
    checkpoint.load_params(dense, progress=lambda done, total: calls.append((done, total)))
    size = sum(t.nbytes for t in hf.random_tensors(hf.DENSE).values())
    assert calls[-1] == (size, size)
    for to in ("orbax", "hf"):
        calls.clear()
        checkpoint.convert(dense, tmp_path / to, to, progress=lambda done, total: calls.append((done, total)))
        assert calls[-1] == (size, size)
    assert HfFolder(dense).bytes_read == 0


def test_files_can_be_cut_anew(tmp_path, dense):
    checkpoint.convert(dense, tmp_path / "a", "hf", max_shard_bytes=30_000)
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "hf", max_shard_bytes=10**9)
    jax.tree.map(np.testing.assert_array_equal, *(checkpoint.load_params(f) for f in (dense, tmp_path / "b")))
