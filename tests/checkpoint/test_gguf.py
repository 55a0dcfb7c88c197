# SPDX-License-Identifier: Apache-2.0
"""GGUF files: every block type to the bit, whole models with config and tokenizer, damage, and what is written."""

import errno
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, models, pre_tokenizers

import checkpoint.hf_folders as hf
from checkpoint.kept_groups import groups_are_the_weights
from mutations import damaged, declare_once, right_or_refused
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import api
from qwen2_jax.checkpoint.formats import gguf_write
from qwen2_jax.checkpoint.formats.gguf_blocks import BLOCKS
from qwen2_jax.checkpoint.formats.gguf_file import read_gguf
from qwen2_jax.checkpoint.formats.gguf_metadata import Metadata
from qwen2_jax.checkpoint.sources import locate
from qwen2_jax.config import ModelConfig
from qwen2_jax.errors import UserError
from qwen2_jax.files.json_text import parse_json_object
from qwen2_jax.infer.engine.generation_config import StoredParams
from qwen2_jax.tokenizer import Tokenizer, pipeline
from recorded import recorded_arrays

QUANT = Path(__file__).parents[3] / "shared" / "data" / "quant"
recorded = pytest.mark.skipif(not QUANT.exists(), reason="the recorded files lie outside the repository")
MODELS = ("all-types", "fallback", "moe", "moe-old-keys", "q4km-tied", "split")


@recorded
def test_every_block_type_to_the_bit():
    vectors = recorded_arrays(QUANT / "gguf_blocks.npz")
    for block in BLOCKS.values():
        raw, values = vectors[f"{block.name}.raw"], vectors[f"{block.name}.values"]
        np.testing.assert_array_equal(block.dequantize(raw).view(np.uint32), values.view(np.uint32), block.name)


def test_a_scale_that_is_not_finite_is_refused():
    for block in BLOCKS.values():
        if block.name != "MXFP4":  # whose scales are powers of two
            with pytest.raises(UserError, match=f"a block of {block.name} has a scale that is not finite"):
                block.dequantize(np.full((1, block.nbytes), 0x7C, np.uint8))


@recorded
@pytest.mark.parametrize("name", ["all-types", "moe"])
def test_int4_keeps_the_blocks_of_the_file(name):
    assert groups_are_the_weights(min((QUANT / f"gguf-{name}").glob("*.gguf"))) > 7


@recorded
@pytest.mark.parametrize("name", MODELS)
def test_recorded_models(name):
    """Weights, config and the ids of texts; that logits follow from these is tested with other formats."""
    file = min((QUANT / f"gguf-{name}").glob("*.gguf"))
    expected = recorded_arrays(file.parent / "expected.npz")
    opened = checkpoint.open_checkpoint(file)
    for key in expected:
        kind, _, weight = key.partition(":")
        if weight:
            with opened.tensors.infos[weight].mapped() as array:
                rows = array[:16] if kind == "rows16" else array
                np.testing.assert_array_equal(rows.astype(np.float32), expected[key], key)
    want = ModelConfig.from_hf(json.loads((file.parent / "expected_config.json").read_text()) | {"dtype": "bfloat16"})
    assert without_windows(opened.config) == without_windows(want)
    tokenizer = tokenizer_of(file)
    for text, ids in zip(expected["texts"], expected["text_ids"], strict=True):
        assert tokenizer.encode(text) == json.loads(str(ids)), text


def without_windows(config):
    """GGUF says nothing of a sliding window that is not used, nor which token fills rows."""
    data = config.to_hf()
    return {k: v for k, v in data.items() if k not in ("sliding_window", "max_window_layers", "pad_token_id")}


def tokenizer_of(file):
    with locate(file).folder_of_small_files() as folder:
        return Tokenizer.from_folder(folder)


@recorded
@pytest.mark.parametrize("file", sorted((QUANT / "gguf-bad").glob("*.gguf")), ids=lambda file: file.stem)
def test_hostile_files_are_refused(file):
    outcome = right_or_refused(0, lambda: checkpoint.open_checkpoint(file))
    assert isinstance(outcome, UserError)


# ---------------------------------------------------------------------- written by us

TINY = hf.DENSE | {"vocab_size": 280, "max_position_embeddings": 64}
SPARSE = hf.SPARSE | {"vocab_size": 280, "max_position_embeddings": 64, "moe_intermediate_size": 32}
MERGED = hf.TIED | {"vocab_size": 280, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "head_dim": 16}


def tokenizer_files(folder: Path, split=None) -> None:
    """A tokenizer of 256 bytes, two merges and three added tokens, of which one is not special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "i"), ("\u0120", "a")]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(merge) for merge in merges)])}
    backend = pipeline(models.BPE(vocabulary, merges))
    if split is not None:
        backend.pre_tokenizer = split
    backend.add_tokens([AddedToken(f"<|{name}|>", special=True) for name in ("endoftext", "im_start", "im_end")])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    settings = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def folder_of(path: Path, config: dict, dtype=hf.F32) -> tuple[Path, dict[str, np.ndarray]]:
    shapes = hf.tensors_of(config)
    if "head_dim" in config:  # hf_folders.py knows models without the key
        width = config["head_dim"] * config["num_attention_heads"]
        kv = config["head_dim"] * config["num_key_value_heads"]
        new = {"q_proj": (width,), "k_proj": (kv,), "v_proj": (kv,), "o_proj": (config["hidden_size"],)}
        for name, shape in shapes.items():
            if "_proj" in name and "self_attn" in name:
                out = new[name.split(".")[-2]]
                rest = (width,) if "o_proj" in name else shape[1:]
                shapes[name] = (*out, *rest) if name.endswith("weight") else out
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal(shape, np.float32).astype(dtype) for name, shape in shapes.items()}
    hf.write_folder(path, config | {"torch_dtype": np.dtype(dtype).name}, tensors, extras=False)
    tokenizer_files(path)
    return path, tensors


@pytest.mark.parametrize("config", [TINY, SPARSE, MERGED], ids=["dense", "moe", "yarn"])
def test_written_files_are_read_back(tmp_path, config):
    """float32 to the bit, halves as rounded, Q8_0 within half a step; names, config, ids and template as they were."""
    folder, tensors = folder_of(tmp_path / "hf", config)
    source, own = checkpoint.open_checkpoint(folder), Tokenizer.from_folder(folder)
    for kind in gguf_write.KINDS:
        file = checkpoint.convert(folder, tmp_path / f"{kind}.gguf", "gguf", dtype=kind)
        opened = checkpoint.open_checkpoint(file)
        got = {name: value.astype(np.float32) for name, value in opened.tensors.stream(list(tensors))}
        for name, value in tensors.items():
            if kind == "float32" or value.ndim == 1 or ".gate.weight" in name or "shared_expert_gate" in name:
                np.testing.assert_array_equal(got[name], value, name)
            elif kind == "q8_0" and value.shape[-1] % 32 == 0:
                steps = np.abs(value.reshape(-1, 32)).max(-1, keepdims=True) / 127
                error = np.abs(got[name] - value).reshape(-1, 32)
                assert (error <= steps * (0.5 + 127 * 2**-11)).all(), name  # the step itself is rounded to float16
                assert opened.tensors.infos[name].kind == "Q8_0"
            elif kind != "q8_0":
                np.testing.assert_array_equal(got[name], value.astype(kind).astype(np.float32), name)
        said = {"torch_dtype": opened.config.dtype, "eos_token_id": own.eos_id}
        assert without_windows(opened.config) == without_windows(source.config) | said
        assert opened.config.dtype == ("float32" if kind == "float32" else "bfloat16")
        tokenizer = tokenizer_of(file)
        assert tokenizer.chat_template == own.chat_template
        for text in ("hi a <|im_end|><tool_call> [PAD270]", "e\u0301"):
            assert tokenizer.encode(text) == own.encode(text)
            assert tokenizer.decode(tokenizer.encode(text)) == own.decode(own.encode(text))
        ends = locate(file).read_json("generation_config.json")["eos_token_id"]
        assert ends == [own.token_id("<|endoftext|>"), own.token_id("<|im_end|>")]


def test_a_quantised_file_becomes_a_folder(tmp_path, capsys):
    """In the dtype of its config; asked for in float32, it holds exactly what the blocks mean."""
    from qwen2_jax.checkpoint.__main__ import main

    folder, tensors = folder_of(tmp_path / "hf", TINY)
    file = checkpoint.convert(folder, tmp_path / "q.gguf", "gguf", dtype="q8_0")
    out = checkpoint.convert(file, tmp_path / "default", "hf")
    exact = checkpoint.convert(file, tmp_path / "exact", "hf", dtype="float32")
    assert checkpoint.open_checkpoint(out).config.dtype == "bfloat16"
    assert sorted(f.name for f in exact.iterdir()) == [
        *("config.json", "generation_config.json", "manifest.json"),
        *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    ]
    meant = dict(checkpoint.open_checkpoint(file).tensors.stream(list(tensors)))
    for name, value in checkpoint.open_checkpoint(exact).tensors.stream(list(tensors)):
        np.testing.assert_array_equal(value, meant[name], name)
    assert main(["inspect", str(tmp_path / "q.gguf")]) == 0
    shown = capsys.readouterr().out
    assert "GGUF" in shown and "Q8_0" in shown


def test_a_folder_with_one_model_is_that_model(tmp_path):
    folder, _ = folder_of(tmp_path / "hf", TINY)
    (tmp_path / "files").mkdir()
    file = checkpoint.convert(folder, tmp_path / "files" / "q8_0.gguf", "gguf", dtype="q8_0")
    assert locate(tmp_path / "files").path == file
    checkpoint.convert(folder, tmp_path / "files" / "f32.gguf", "gguf", dtype="float32")
    with pytest.raises(UserError, match=r"several GGUF models; give one of them: f32\.gguf, q8_0\.gguf"):
        locate(tmp_path / "files")


def test_what_cannot_be_written(tmp_path):
    folder, _ = folder_of(tmp_path / "hf", TINY)
    (tmp_path / "there.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="exists already; choose another name"):
        checkpoint.convert(folder, tmp_path / "there.gguf", "gguf")
    with pytest.raises(UserError, match="gcloud storage cp"):
        checkpoint.convert(folder, "gs://bucket/new.gguf", "gguf")
    tokenizer_files(folder, pre_tokenizers.ByteLevel(add_prefix_space=False))
    with pytest.raises(UserError, match="does not split text as Qwen2's"):
        checkpoint.convert(folder, tmp_path / "new.gguf", "gguf")
    tokenizer_files(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, 2) - 4)
    with pytest.raises(UserError, match="truncated"):
        checkpoint.convert(folder, tmp_path / "new.gguf", "gguf")
    assert not list(tmp_path.glob("new*"))


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    folder, _ = folder_of(tmp_path / "hf", TINY)

    def full(array, type_id):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(gguf_write, "_encoded", full)
    with pytest.raises(OSError, match="the disk became full; nothing was left behind"):
        checkpoint.convert(folder, tmp_path / "new.gguf", "gguf")
    assert not list(tmp_path.glob("new*"))


def test_mutated_files(tmp_path, mutations, monkeypatch):
    """Damage in what stands before the tensors: the model with its tokenizer is read, or refused in one line."""
    declare_once(monkeypatch, api)
    folder, _ = folder_of(tmp_path / "hf", TINY | {"num_hidden_layers": 1})
    file = checkpoint.convert(folder, tmp_path / "good.gguf", "gguf", dtype="q8_0")
    content = file.read_bytes()
    end = min(tensor.stored.start for tensor in read_gguf(file).tensors.values())
    bad = tmp_path / "bad.gguf"

    def use():
        opened = checkpoint.open_checkpoint(bad)
        for info in opened.tensors.infos.values():
            with info.mapped():
                pass
        tokenizer_of(bad).encode("hi")

    for seed in mutations:
        bad.write_bytes(damaged(seed, content[:end]) + content[end:])
        right_or_refused(seed, use)


# What a value of GGUF's metadata may be: a number of 8 to 64 bits, a text, a list of texts, an array of numbers.
METADATA = (
    0, 1, -1, 2, 7, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1, -(2**63), True, False, 0.0, -1.0, 1e-30, 3e38, math.inf,
    math.nan, "", "x", "qwen2moe", "linear", "a b", "<|im_end|>", [], ["x"], ["a b c", ""],
    np.array([], np.int32), np.array([1, 3], np.int32), np.array([math.nan], np.float32), np.array([True]),
)  # fmt: skip


def test_mutated_metadata(tmp_path, mutations):
    """Values of other types, beyond all bounds, missing or of another length: usable files, or one line."""
    folder, _ = folder_of(tmp_path / "hf", TINY | {"num_hidden_layers": 1})
    read = read_gguf(checkpoint.convert(folder, tmp_path / "good.gguf", "gguf", dtype="q8_0"))
    shapes = {name: tensor.shape for name, tensor in read.tensors.items()}
    extra = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0, "rope.scaling.original_context_length": 64}
    good = read.metadata | {f"qwen2.{key}": value for key, value in extra.items()}

    def use(metadata):
        held = Metadata("file", metadata, shapes, "bfloat16")
        config = ModelConfig.from_hf(parse_json_object(held.file("config.json"), "config.json"))
        StoredParams.read(parse_json_object(held.file("generation_config.json"), "generation_config.json"))
        settings = parse_json_object(held.file("tokenizer_config.json"), "tokenizer_config.json")
        tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(held.file("tokenizer.json")), settings)
        assert all(0 <= i < config.vocab_size for i in tokenizer.encode("hi there 42 <|im_end|>"))

    use(good)
    for seed in mutations:
        draw = random.Random(seed)
        metadata = dict(good)
        for key in draw.sample(sorted(good), draw.choice((1, 1, 2, 4))):
            value = metadata.pop(key)
            match draw.choice(("replace", "replace", "replace", "drop", "rename", "inside")):
                case "replace":
                    metadata[key] = draw.choice(METADATA)
                case "rename":
                    metadata[key.replace("qwen2.", "qwen2moe.")] = value
                case "inside" if isinstance(value, list | np.ndarray) and len(value):
                    metadata[key] = copied = value.copy()
                    copied[draw.randrange(len(value))] = draw.choice((7, -1)) if isinstance(value, np.ndarray) else "x"
                case "inside":
                    metadata[key] = [str(value)]
        right_or_refused(seed, lambda metadata=metadata: use(metadata))
