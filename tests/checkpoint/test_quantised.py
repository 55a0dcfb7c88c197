# SPDX-License-Identifier: Apache-2.0
"""Quantised Hugging Face folders: weights to the bit, configs, what is refused."""

import json
import math
import random
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import checkpoint.hf_folders as hf
import qwen2_jax
from checkpoint.kept_groups import groups_are_the_weights
from mutations import declare_once, mutated, right_or_refused
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import api
from qwen2_jax.checkpoint.merge_models import Merge, merge
from qwen2_jax.checkpoint.peft import quantised_base
from qwen2_jax.errors import UserError
from recorded import recorded_arrays

QUANT = Path(__file__).parents[3] / "shared" / "data" / "quant"
recorded = pytest.mark.skipif(not QUANT.exists(), reason="the recorded folders lie outside the repository")
FOLDERS = (
    *("gptq-int4", "gptq-int4-act-order", "gptq-int8", "gptq-moe-int4", "gptq-v2-asym"),
    *("awq", "awq-skip", "awq-tied-head-spelled", "bnb-int8", "bnb-nf4", "fp8-static"),
    *("ct-w4a16", "ct-w4a16-asym", "ct-w8a16", "ct-w8a8", "ct-fp8-dynamic"),
)


def weights_are(folder: Path, expected) -> None:
    """Every recorded weight of an opened folder to the bit."""
    tensors = checkpoint.open_checkpoint(folder).tensors
    for key in expected:
        kind, _, name = key.partition(":")
        if name:
            with tensors.infos[name].mapped() as array:
                rows = array[:16] if kind == "rows16" else array
                np.testing.assert_array_equal(rows.astype(np.float32), expected[key], name)


@recorded
@pytest.mark.parametrize("name", FOLDERS)
def test_recorded_weights(name):
    weights_are(QUANT / name, recorded_arrays(QUANT / name / "expected.npz"))


@recorded
@pytest.mark.parametrize("name", FOLDERS)
def test_int4_keeps_the_integers_of_the_files(name):
    """But for code books, float8, and columns that are not in the order of their groups."""
    count = groups_are_the_weights(QUANT / name)
    assert (count == 0) == (name in ("bnb-nf4", "fp8-static", "ct-fp8-dynamic", "gptq-int4-act-order"))


def copied(folder: Path, to: Path, change=None) -> Path:
    """A copy that can be written to, with config.json changed."""
    to.mkdir()
    for file in folder.iterdir():
        shutil.copyfile(file, to / file.name)
    config = json.loads((to / "config.json").read_text())
    if change is not None:
        change(config)
    (to / "config.json").write_text(json.dumps(config))
    return to


@recorded
def test_spellings_of_one_gptq_folder(tmp_path):
    """Symmetric zeros stored as 8 in place of 7, no g_idx, and the settings in a file of their own."""
    source, expected = QUANT / "gptq-int4", recorded_arrays(QUANT / "gptq-int4" / "expected.npz")
    for name, change in {
        "eight": lambda t: {k: v + np.int32(0x11111111) if k.endswith("qzeros") else v for k, v in t.items()},
        "without": lambda t: {k: v for k, v in t.items() if not k.endswith("g_idx")},
    }.items():
        folder = copied(source, tmp_path / name)
        parts = {}
        for file in folder.glob("*.safetensors"):
            parts |= load_file(file)
            file.unlink()
        (folder / "model.safetensors.index.json").unlink()
        save_file(change(parts), folder / "model.safetensors")
        weights_are(folder, expected)
    settings = {}
    folder = copied(source, tmp_path / "beside", lambda config: settings.update(config.pop("quantization_config")))
    settings.pop("quant_method")
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    weights_are(folder, expected)


@recorded
def test_logits_of_a_loaded_folder():
    expected = recorded_arrays(QUANT / "gptq-int4" / "expected.npz")
    lm = qwen2_jax.load(str(QUANT / "gptq-int4"), dtype="float32")
    logits, ids = expected["logits"].astype(np.float64), expected["ids"]
    want = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    want = np.take_along_axis(want[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
    got = np.array([row[-want.shape[1] :] for row in lm.logprobs(ids.tolist())], np.float64)
    # float32 sums of transformers and of ours: 1e-5 was measured; a wrong nibble, zero or group moves them by 0.3.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


@recorded
@pytest.mark.parametrize(
    "case", json.loads((QUANT / "refuse.json").read_text()) if QUANT.exists() else [], ids=lambda case: case["name"]
)
def test_what_is_not_read_is_named(tmp_path, case):
    change = lambda config: config.update(quantization_config=case["quantization_config"])
    with pytest.raises(UserError, match=case["message_names"]):
        checkpoint.open_checkpoint(copied(QUANT / "gptq-int4", tmp_path / "m", change))


# ---------------------------------------------------------------------- made here

CONFIG = hf.DENSE | {"intermediate_size": 64, "torch_dtype": "float16"}
GROUP, BITS = 16, 4


def pack(q: np.ndarray, axis: int, order=range(8)) -> np.ndarray:
    """Values below 16 as int32 words along an axis: value j of a word is at nibble order[j]."""
    q = np.moveaxis(q, axis, -1)
    words = np.zeros((*q.shape[:-1], q.shape[-1] // 8), np.uint64)
    for j, place in enumerate(order):
        words |= q[..., j::8].astype(np.uint64) << np.uint64(4 * place)
    return np.ascontiguousarray(np.moveaxis(words.astype(np.uint32).view(np.int32), -1, axis))


def made(folder: Path, method: str) -> dict[str, np.ndarray]:
    """A folder with random integers in each projection; returns the weights that they mean."""
    rng, tensors, means = np.random.default_rng(0), {}, {}
    for name, value in hf.random_tensors(CONFIG, hf.F16).items():
        if not name.endswith("_proj.weight"):
            tensors[name], means[name] = value, value
            continue
        F, K = value.shape
        q, zero = rng.integers(0, 16, (K, F)), rng.integers(1, 16, (K // GROUP, F))
        scales = rng.uniform(0.5, 2, zero.shape).astype(np.float16)
        group = rng.permutation(K) // GROUP if method == "gptq" else np.arange(K) // GROUP
        means[name] = (scales.astype(np.float32)[group] * (q - zero[group]).astype(np.float32)).T
        module = name.removesuffix(".weight")
        if method == "gptq":
            parts = {"qweight": pack(q, 0), "qzeros": pack(zero - 1, 1), "g_idx": group.astype(np.int32)}
        else:
            order = (0, 4, 1, 5, 2, 6, 3, 7)
            parts = {"qweight": pack(q, 1, order), "qzeros": pack(zero, 1, order)}
        tensors |= {f"{module}.{part}": value for part, value in (parts | {"scales": scales}).items()}
    settings = {"quant_method": method, "bits": BITS, "group_size": GROUP}
    settings |= {"sym": False, "desc_act": True} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    hf.write_folder(folder, CONFIG | {"quantization_config": settings}, tensors, extras=False)
    return means


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_weights_config_and_conversion(tmp_path, method):
    means = made(tmp_path / "packed", method)
    opened = checkpoint.open_checkpoint(tmp_path / "packed")
    assert opened.config.dtype == "bfloat16"  # activations of Qwen2 overflow in float16
    for name, value in opened.tensors.stream(list(means)):
        np.testing.assert_array_equal(value.astype(np.float32), means[name], name)
    out = checkpoint.convert(tmp_path / "packed", tmp_path / "plain", "hf")
    assert "quantization_config" not in (out / "config.json").read_text()
    for name, value in checkpoint.open_checkpoint(out).tensors.stream(list(means)):
        np.testing.assert_array_equal(value, means[name].astype(ml_dtypes.bfloat16), name)


def test_tensors_that_contradict_each_other_are_named(tmp_path):
    made(tmp_path / "packed", "gptq")
    file = tmp_path / "packed" / "model.safetensors"
    tensors = load_file(file)
    q, o = (f"model.layers.0.self_attn.{name}_proj" for name in "qo")
    del tensors[f"{q}.scales"]
    tensors[f"{o}.qzeros"] = tensors[f"{o}.qzeros"][:1]
    tensors[f"{o}.bias"] = np.ones(32, np.float16)
    k, v = (f"model.layers.0.self_attn.{name}_proj" for name in "kv")
    tensors[f"{k}.g_idx"] = tensors[f"{k}.g_idx"].astype(np.float32)
    tensors[f"{v}.weight"] = np.ones((16, 32), np.float16)
    save_file(tensors, file)
    with pytest.raises(UserError) as refused:
        checkpoint.open_checkpoint(tmp_path / "packed")
    text = str(refused.value)
    assert f"{q}: has no scales" in text and f"{o}: qzeros is [1, 4]" in text and f"{o}.bias" in text
    assert f"{k}: g_idx is float32" in text and f"{v}: weight is float16; packed tensors take its place" in text


def test_merging(tmp_path):
    """A quantised model is merged as its values, with a warning; AWQ, whose norms are scaled, is refused."""
    means = made(tmp_path / "gptq", "gptq")
    changed = {
        name: np.add(value, 0.5, dtype=np.float32).astype(np.float16, order="C") for name, value in means.items()
    }
    hf.write_folder(tmp_path / "other", CONFIG, changed, extras=False)
    with pytest.warns(UserWarning, match=r"gptq is quantised \(GPTQ int4\): its rounding is merged") as said:
        merge(tmp_path / "gptq", [tmp_path / "other"], tmp_path / "out", Merge(method="linear"))
    assert len(said) == 1
    opened = checkpoint.open_checkpoint(tmp_path / "out")
    assert opened.config.dtype == "bfloat16"  # as convert writes it, not the float32 of the arithmetic
    for name, value in opened.tensors.stream(list(means)):
        np.testing.assert_array_equal(value, changed[name].astype(ml_dtypes.bfloat16), name)
    made(tmp_path / "awq", "awq")
    for base, model in (("awq", "other"), ("other", "awq")):
        with pytest.raises(UserError, match=r"awq is AWQ, .* merge unquantised ones"):
            merge(tmp_path / base, [tmp_path / model], tmp_path / "no", Merge(method="linear"))


def test_what_is_said_before_training(tmp_path):
    for method, fits in (("gptq", "the unquantised model only nearly"), ("awq", "this checkpoint and no other")):
        made(tmp_path / method, method)
        source = checkpoint.locate(tmp_path / method)
        assert fits in quantised_base("base", source, adapters=True)
        kind = {"gptq": "GPTQ int4", "awq": "AWQ int4"}[method]
        assert quantised_base("base", source, adapters=False) == (
            f"base is quantised ({kind}) and is trained as its dequantised values; the result is not quantised"
        )
    assert quantised_base("demo", checkpoint.locate("demo"), adapters=True) is None


def test_mutated_settings(tmp_path, mutations, monkeypatch):
    """quantization_config of each method, on tensors of GPTQ: read, or refused in one line."""
    declare_once(monkeypatch, api)
    made(tmp_path / "packed", "gptq")
    file = tmp_path / "packed" / "config.json"
    config = json.loads(file.read_text())
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "group_size": 16, "strategy": "group"}
    settings = [
        config["quantization_config"],
        {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"},
        {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False},
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    ]

    def use():
        for info in checkpoint.open_checkpoint(tmp_path / "packed").tensors.infos.values():
            with info.mapped():
                pass

    for seed in mutations:
        changed = mutated(seed, settings[seed % len(settings)])
        file.write_text(json.dumps(config | {"quantization_config": changed}))
        right_or_refused(seed, use)


SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "I32": 4, "I64": 8, "F8_E4M3": 1, "F64": 8, "BOOL": 1}


def changed_tensors(draw: random.Random, entries: dict[str, dict], data: bytes) -> tuple[dict[str, dict], bytes]:
    """A header and its data that fit together, in which one to three tensors have other shapes, dtypes or names."""
    parts = {name: (e["dtype"], e["shape"], data[slice(*e["data_offsets"])]) for name, e in entries.items()}
    for name in draw.sample(sorted(parts), draw.choice((1, 1, 2, 3))):
        dtype, shape, content = parts.pop(name)
        size, axis = len(content) // max(1, math.prod(shape)), draw.randrange(max(1, len(shape)))
        match draw.choice(
            ("resize", "resize", "resize", "order", "flat", "deeper", "dtype", "dtype", "drop", "rename", "content")
        ):
            case "resize" if shape:
                n = shape[axis]
                shape = [*shape[:axis], draw.choice((0, 0, 1, n - 1, n + 1, 2 * n, n // 2, 7)), *shape[axis + 1 :]]
            case "order":
                shape = shape[::-1]
            case "flat":
                shape = [math.prod(shape)]
            case "deeper":
                shape = draw.choice(([1, *shape], [*shape, 1], [0, *shape]))
            case "dtype":
                dtype, new = draw.choice(list(SIZES.items()))
                size = new if new != size and draw.random() < 0.7 else size
            case "drop":
                continue
            case "rename":
                name = draw.choice((name + "_", name.replace("weight", "scales"), name.replace("layers.0", "layers.7")))
            case "content":
                content = draw.randbytes(len(content))
        wanted = math.prod(shape) * size
        parts[name] = (dtype, shape, (content * (wanted // max(1, len(content)) + 1))[:wanted].ljust(wanted, b"\1"))
    header, out = {}, b""
    for name, (dtype, shape, content) in parts.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(out), len(out) + len(content)]}
        out += content
    return header, out


@recorded
@pytest.mark.parametrize("method", ["gptq", "awq", "ct", "fp8", "bnb"])
def test_mutated_folders(tmp_path, mutations, method, monkeypatch):
    """Settings, headers and tensors of each method: weights of the model's shapes, or one line."""
    declare_once(monkeypatch, api)
    folders = []
    for name in (name for name in FOLDERS if name.startswith(method)):
        folder = copied(QUANT / name, tmp_path / name)
        file = min(folder.glob("*.safetensors"))
        content = file.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        entries = json.loads(content[8:start])
        entries.pop("__metadata__", None)
        folders.append(
            (folder, file, content, json.loads((folder / "config.json").read_text()), entries, content[start:])
        )

    def use(folder: Path) -> None:
        for info in checkpoint.open_checkpoint(folder).tensors.infos.values():
            with info.mapped() as weight:
                assert weight.shape == info.shape and weight.dtype == info.dtype

    for seed in mutations:
        folder, file, content, config, entries, data = folders[seed % len(folders)]
        if seed % 4 == 0:
            settings = mutated(seed, config["quantization_config"])
            (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
        else:
            header, new = (
                (mutated(seed, entries), data) if seed % 4 == 1 else changed_tensors(random.Random(seed), entries, data)
            )
            text = json.dumps(header).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + new)
        right_or_refused(seed, lambda folder=folder: use(folder))
        (folder / "config.json").write_text(json.dumps(config))
        file.write_bytes(content)
