# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that people have: what other tools read is read, and what cannot be meant is named."""

import gc
import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import checkpoint.hf_folders as hf
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.checkpoint.formats.casting import narrowed
from qwen2_jax.errors import CheckpointError
from qwen2_jax.infer.lm import load

REPORTS = Path(__file__).parents[3] / "shared" / "data" / "reports"


def report(name) -> Path:
    if not (REPORTS / name).exists():
        pytest.skip(f"{REPORTS / name} is not here")
    return REPORTS / name


def test_names_without_model_in_front(tmp_path):
    """What save_pretrained of the bare decoder writes: read, converted, and written back with the same bytes."""
    source = report("no-model-prefix")
    expected = json.loads((source / "expected.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = load(source, dtype="float32").logprobs([expected["ids"]])
    np.testing.assert_allclose(got, [expected["logprobs"]], atol=1e-4)  # the bar against transformers in float32
    checkpoint.convert(source, tmp_path / "a", "orbax")
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "hf")
    assert checkpoint.verify(tmp_path / "b").damaged == ()
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (source / name).read_bytes()


def test_the_bare_decoder_of_a_model_with_a_head_is_refused(tmp_path):
    tensors = {name.removeprefix("model."): array for name, array in hf.random_tensors(hf.DENSE).items()}
    head = tensors.pop("lm_head.weight")
    with pytest.raises(CheckpointError, match=r"missing \(1\): lm_head\.weight"):
        checkpoint.open_checkpoint(hf.write_folder(tmp_path / "a", hf.DENSE, tensors))
    whole = hf.write_folder(tmp_path / "b", hf.DENSE, tensors | {"lm_head.weight": head}, shards=2)
    checkpoint.convert(whole, tmp_path / "c", "orbax")
    checkpoint.convert(tmp_path / "c", tmp_path / "d", "hf")
    assert hf.files_of(tmp_path / "d") == hf.files_of(whole)


def test_bidirectional_attention_is_refused():
    with pytest.raises(CheckpointError, match=r"config\.json: is_causal is False; supported: None, True"):
        checkpoint.open_checkpoint(report("is-causal-false"))


@pytest.mark.parametrize("to", ["hf", "orbax"])
def test_float16_that_does_not_hold_the_weights(tmp_path, to, capsys):
    source = report("convert-float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["convert", str(source), str(tmp_path / "out"), "--to", to, "--dtype", "float16"]) == 2
    assert "model.norm.weight has numbers beyond 65504, the largest of float16" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", to, "--dtype", "float32"]) == 0


def test_what_is_not_finite_already_is_copied():
    array = np.array([1, np.inf, -np.inf, np.nan], np.float32)
    for dtype in (hf.BF16, hf.F16):
        np.testing.assert_array_equal(narrowed("x", array, dtype).astype(np.float32), array)
        for large in (3.4028235e38, -3.4028235e38):
            with pytest.raises(CheckpointError, match="x has numbers beyond"):
                narrowed("x", np.append(array, np.float32(large)), dtype)
    assert narrowed("x", np.array([65504], hf.F32), hf.F16) == [65504]
    assert narrowed("x", array, hf.F32) is array


def test_adapters_are_no_checkpoint(tmp_path, capsys):
    adapter = shutil.copytree(report("adapter-as-checkpoint") / "adapter", tmp_path / "adapter")
    for name in ("config.json", "tokenizer.json"):  # as somebody adds who reads that they are missing
        with pytest.raises(CheckpointError) as caught:
            checkpoint.locate(adapter)
        assert f"{adapter} holds LoRA adapters (of demo), not a whole model" in str(caught.value)
        for word in ("`hf` folder", "merge", "--start.adapter"):
            assert word in str(caught.value)
        (adapter / name).write_text("{}")
    assert main(["convert", str(adapter), str(tmp_path / "out"), "--to", "orbax"]) == 2
    assert "holds LoRA adapters (of demo)" in capsys.readouterr().err
    (adapter / "model.safetensors").touch()  # a whole model beside its adapters
    assert checkpoint.locate(adapter).kind == "hf"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of reads that Orbax gave up
def test_whatever_orbax_raises_names_the_folder(tmp_path, capsys):
    one_layer, folder = hf.TIED | {"num_hidden_layers": 1}, tmp_path / "orbax"
    checkpoint.convert(hf.write_folder(tmp_path / "hf", one_layer, hf.random_tensors(one_layer)), folder, "orbax")
    (file,) = (folder / "state" / "array_metadatas").iterdir()
    for content in (b"", b'{"array_metadatas": [[]]}'):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=str(folder)):
            checkpoint.load_params(folder)
    # in a process of its own: what the other reads raise when one has failed is printed by Python, past pytest
    found = subprocess.run(
        [sys.executable, "-m", "qwen2_jax.checkpoint", "verify", str(folder)], capture_output=True, text=True
    )
    *arrays, last = found.stderr.splitlines()
    assert (found.returncode, found.stdout) == (1, "") and arrays
    assert all(line.startswith("damaged: ") for line in arrays), found.stderr
    assert last == f"{folder}: {len(arrays)} damaged; fetch or convert the checkpoint again"
    gc.collect()
