# SPDX-License-Identifier: Apache-2.0
"""Writing GPTQ: the rounding against a slow definition, what a folder means, experts, and what is refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoint.hf_folders as hf
from mutations import mutated_json, right_or_refused
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.checkpoint.gptq import calibrate
from qwen2_jax.checkpoint.gptq.rounding import factor, meant, output_error, packed, rounded
from qwen2_jax.checkpoint.token_rows import token_rows
from qwen2_jax.errors import UserError
from qwen2_jax.tokenizer import Tokenizer

DEMO = Path(checkpoint.locate("demo").path)
TEXT = Path(__file__).parents[2] / "README.md"
DENSE = hf.DENSE | {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SPARSE = hf.SPARSE | {  # of the dense model's sizes, so that the programs are the same
    "vocab_size": 2048, "hidden_size": 64, "num_hidden_layers": 1, "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 96, "num_experts": 4, "num_experts_per_tok": 1,
}  # fmt: skip


def model(folder: Path, config: dict, change=None) -> Path:
    """A random model with the demo's tokenizer."""
    tensors = {}
    for name, value in hf.random_tensors(config, hf.F32).items():
        scale = 0.05 if "proj" in name or "gate" in name else 1.0
        tensors[name] = value * np.float32(scale) + np.float32("norm" in name) * 2
    if change is not None:
        change(tensors)
    hf.write_folder(folder, config, {name: value.astype(hf.BF16) for name, value in tensors.items()}, extras=False)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / file, folder / file)
    return folder


def decoded(tensors: dict[str, np.ndarray], module: str) -> np.ndarray:
    """The weight of a module by the definition of the format, one integer at a time."""
    words, zeros = (tensors[f"{module}.{part}"].view(np.uint32) for part in ("qweight", "qzeros"))
    scales, group_of = tensors[f"{module}.scales"], tensors[f"{module}.g_idx"]
    out = np.zeros((words.shape[1], 8 * len(words)), np.float32)
    for (f, k), _ in np.ndenumerate(out):
        q = int(words[k // 8, f]) >> 4 * (k % 8) & 15
        zero = (int(zeros[group_of[k], f // 8]) >> 4 * (f % 8) & 15) + 1
        out[f, k] = np.float32(scales[group_of[k], f]) * np.float32(q - zero)
    return out


# ---------------------------------------------------------------------- one matrix


def inputs(I: int, tokens: int, seed: int = 0) -> np.ndarray:
    """Correlated, with a few large ones, float64 [tokens, I]."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, I)) @ (np.eye(I) + 0.3 * rng.standard_normal((I, I)))
    return mixed * np.where(np.arange(I) % 17 == 3, 6.0, 1.0)


def by_elimination(w_OI: np.ndarray, h_II: np.ndarray, scale_OG: np.ndarray) -> np.ndarray:
    """The integers by the paper's equations 2 and 3: the inverse is updated after each column, in float64."""
    w, inverse, q = w_OI.astype(np.float64), np.linalg.inv(h_II), np.zeros(w_OI.shape, int)
    group = w.shape[1] // scale_OG.shape[1]
    for j in range(w.shape[1]):
        scale = scale_OG[:, j // group].astype(np.float64)
        q[:, j] = np.clip(np.round(w[:, j] / scale) + 8, 0, 15)
        off = (w[:, j] - scale * (q[:, j] - 8)) / inverse[j, j]
        w -= np.outer(off, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, j] = 1.0  # this row and column are zero now, and are not read again
    return q


def test_rounding_is_the_papers():
    x = inputs(96, 400)
    h_II = x.T @ x / len(x)
    w_OI = np.random.default_rng(1).standard_normal((24, 96)).astype(np.float32)
    u_II, dead = factor(jnp.asarray(h_II, jnp.float32), jnp.float32(0.01))
    q_OI, scale_OG = (np.asarray(part) for part in rounded(jnp.asarray(w_OI), u_II, 32))
    assert not dead.any()
    assert scale_OG.dtype == np.float16 and scale_OG.shape == (24, 3)
    damped = h_II + 0.01 * np.diag(h_II).mean() * np.eye(96)
    np.testing.assert_array_equal(q_OI, by_elimination(w_OI, damped, scale_OG))

    plain = rounded(jnp.asarray(w_OI), None, 32)
    errors = [
        np.square((meant(np.asarray(q), np.asarray(s)) - w_OI).astype(np.float64) @ x.T).sum()
        for q, s in ((q_OI, scale_OG), plain)
    ]
    assert errors[0] < 0.75 * errors[1]  # 0.63 was measured; for these inputs rounding alone is that much worse
    mine = float(output_error(jnp.asarray(meant(q_OI, scale_OG) - w_OI), jnp.asarray(h_II, jnp.float32)))
    np.testing.assert_allclose(mine, errors[0] / len(x), rtol=1e-3)


def test_dead_inputs():
    """Inputs that are always zero take no part, and any weights of theirs do no harm."""
    x = inputs(64, 300)
    x[:, [5, 40, 63]] = 0
    w_OI = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    w_OI[:, 40] = 1e4
    found = calibrate._round_together({"m": w_OI}, jnp.asarray(x.T @ x, jnp.float32), len(x), 32)["m"]
    assert found.method == "gptq"
    assert found.error <= found.plain_error
    np.testing.assert_array_equal(found.meant_OI[:, [5, 40, 63]], 0)
    everything = calibrate._round_together({"m": w_OI}, jnp.zeros((64, 64)), 300, 32)["m"]
    assert np.isfinite(everything.meant_OI).all()


def test_groups_of_zeros_and_of_tiny_and_large_weights():
    w_OI = np.zeros((8, 96), np.float32)
    w_OI[:, 32:64], w_OI[:, 64:] = 1e-9, 4e5
    found = calibrate._round_together({"m": w_OI}, 10 * jnp.eye(96), 10, 32)["m"]
    np.testing.assert_array_equal(found.meant_OI[:, :64], 0)
    np.testing.assert_allclose(found.meant_OI[:, 64:], 4e5, rtol=0.08)
    with pytest.raises(UserError, match=r"m: .*too large for float16 scales"):
        calibrate._round_together({"m": w_OI * 10}, 10 * jnp.eye(96), 10, 32)


def test_packing_by_its_definition():
    rng = np.random.default_rng(3)
    q_OI, scale_OG = rng.integers(0, 16, (16, 64)).astype(np.uint8), rng.random((16, 2)).astype(np.float16)
    parts = packed(q_OI, scale_OG)
    assert {name: (str(part.dtype), part.shape) for name, part in parts.items()} == {
        "qweight": ("int32", (8, 16)), "qzeros": ("int32", (2, 2)), "scales": ("float16", (2, 16)),
        "g_idx": ("int32", (64,)),
    }  # fmt: skip
    want = decoded({f"m.{name}": part for name, part in parts.items()}, "m")
    np.testing.assert_array_equal(meant(q_OI, scale_OG), want)


# ---------------------------------------------------------------------- a whole model


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """The folder of a dense model, written by the command; the model is beside it."""
    folder = tmp_path_factory.mktemp("gptq")
    model(folder / "model", DENSE)
    given = ["--text", str(TEXT), "--sequences", "16", "--length", "128"]
    assert main(["convert", str(folder / "model"), str(folder / "out"), "--to", "gptq", *given]) == 0
    return folder / "out"


def test_a_written_folder_is_what_was_meant(written):
    tensors, before = load_file(written / "model.safetensors"), load_file(written.parent / "model/model.safetensors")
    opened = checkpoint.open_checkpoint(written)
    modules = [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]
    assert len(modules) == 7 * DENSE["num_hidden_layers"]
    for name in opened.tensors.infos:
        with opened.tensors.infos[name].mapped() as array:
            if (module := name.removesuffix(".weight")) in modules:
                np.testing.assert_array_equal(array, decoded(tensors, module), name)
                assert (tensors[f"{module}.qzeros"].view(np.uint32) == 0x77777777).all()
            else:
                np.testing.assert_array_equal(array, before[name])
    assert checkpoint.verify(written).hashed and not checkpoint.verify(written).damaged
    settings = json.loads((written / "config.json").read_text())["quantization_config"]
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    assert settings | wanted | {"checkpoint_format": "gptq"} == settings


def test_the_report(written):
    report = json.loads((written / "gptq_report.json").read_text())
    assert len(report["modules"]) == 14
    for name, row in report["modules"].items():
        assert row["error"] <= row["plain_error"] < 0.5, name
        assert row["method"] == "gptq"
        assert row["tokens"] == report["sequences"] * report["length"]
    better = sum(row["error"] < 0.95 * row["plain_error"] for row in report["modules"].values())
    assert better >= 12
    assert report["kl"]["positions"] == 128 and 0 < report["kl"]["mean_kl"] < 0.2


def test_what_is_written_generates_and_converts(written, tmp_path):
    assert main(["verify", str(written)]) == 0
    checkpoint.convert(written, tmp_path / "hf", "hf")
    assert not (tmp_path / "hf/gptq_report.json").exists()
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())


def test_experts(tmp_path):
    """Experts that get few tokens or none: more damping, or rounding; the folder reads back as it was meant."""

    def change(tensors):
        tensors["model.layers.0.mlp.gate.weight"][3] = -100 * np.abs(tensors["model.layers.0.mlp.gate.weight"][3])
        tensors["model.layers.0.post_attention_layernorm.weight"][:] = 1
        tensors["model.embed_tokens.weight"] = np.abs(tensors["model.embed_tokens.weight"])

    source = model(tmp_path / "moe", SPARSE, change)
    check = checkpoint.write_gptq(source, tmp_path / "out", TEXT, sequences=2, length=64, max_kl=9)
    tokens = {e: check.modules[f"model.layers.0.mlp.experts.{e}.gate_proj"]["tokens"] for e in range(4)}
    seen = check.sequences * check.length
    assert tokens[3] == 0 and sum(tokens.values()) == seen
    for name, row in check.modules.items():
        assert row["error"] <= row["plain_error"]
        if "experts." in name and row["tokens"] == 0:
            assert row["method"] == "rounding"
        elif row["tokens"] < (96 if "down_proj" in name else 64):
            assert row["method"] in ("gptq, damp 0.1", "rounding")
    assert any(row["method"] == "gptq, damp 0.1" for row in check.modules.values())
    assert "rounding (0 tokens): model.layers.0.mlp.experts.3.up_proj" in check.table()
    tensors = load_file(tmp_path / "out/model.safetensors")
    opened = checkpoint.open_checkpoint(tmp_path / "out").tensors.infos
    for name in ("mlp.experts.1.gate_proj", "mlp.experts.3.down_proj", "mlp.shared_expert.up_proj"):
        with opened[f"model.layers.0.{name}.weight"].mapped() as array:
            np.testing.assert_array_equal(array, decoded(tensors, f"model.layers.0.{name}"))
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == hf.BF16


def expert_inputs(x_MD: np.ndarray, router_ED: np.ndarray, e: int) -> np.ndarray:
    return x_MD[(x_MD @ router_ED.T).argmax(-1) == e]


@pytest.mark.slow  # quick: what comes of them, in test_experts
def test_sums_of_experts(tmp_path):
    """The sums of one expert are those of the rows that the router sends to it, computed here by numpy."""
    loaded = calibrate.ByLayer(model(tmp_path / "moe", SPARSE))
    params, x = loaded.layer(0), np.random.default_rng(0).standard_normal((2, 40, 64)).astype(np.float32)
    sums, experts = calibrate._sums(loaded, 0, params, x)
    block, config = params["blocks"][0], loaded.config
    attended = x.copy()
    loaded.run(0, params | {"blocks": {0: without_mlp(block)}}, attended)
    scale = np.sqrt(np.square(attended).mean(-1, keepdims=True) + config.rms_norm_eps)
    x_MD = (attended / scale * np.asarray(block["mlp_norm_D"][0])).reshape(-1, 64)
    np.testing.assert_allclose(sums[calibrate.SHARED_INPUT], x_MD.T @ x_MD, rtol=1e-4, atol=1e-2)
    for e, expert in enumerate(experts):
        rows = expert_inputs(x_MD, np.asarray(block["moe"]["router_ED"][0]), e)
        gate, up = (rows @ np.asarray(block["moe"][name][0, e]).T for name in ("gate_EFD", "up_EFD"))
        hidden = gate / (1 + np.exp(-gate)) * up
        assert expert.tokens == len(rows)
        for name, want in (("gate_EFD", rows.T @ rows), ("down_EDF", hidden.T @ hidden)):
            np.testing.assert_allclose(expert.h["moe", name], want, rtol=1e-4, atol=1e-2)


def without_mlp(block):
    """The block with a feed-forward layer that gives zeros."""
    moe = block["moe"]
    nothing = {"down_EDF": moe["down_EDF"] * 0, "shared": moe["shared"] | {"down_DF": moe["shared"]["down_DF"] * 0}}
    return block | {"moe": moe | nothing}


# ---------------------------------------------------------------------- what is refused, and leaves nothing


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.inf, r"model\.layers\.1\.mlp\.up_proj: its weights are not finite"),
        (
            "model.layers.0.input_layernorm.weight",
            np.nan,
            r"model\.layers\.0\.self_attn\..*: its inputs are not finite",
        ),
    ],
)
def test_not_finite(tmp_path, name, value, message):
    def change(tensors):
        tensors[name].reshape(-1)[7] = value

    source = model(tmp_path / "model", DENSE, change)
    with pytest.raises(UserError, match=message):
        checkpoint.write_gptq(source, tmp_path / "out", TEXT, sequences=2, length=64)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_stopped_and_too_far(tmp_path, written):
    source = written.parent / "model"

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpoint.write_gptq(source, tmp_path / "out", TEXT, sequences=2, length=64, progress=stop)
    with pytest.raises(UserError, match=r"mean KL of 0\.\d+ nats is above 1e-06, so nothing is written"):
        checkpoint.write_gptq(source, tmp_path / "out", TEXT, sequences=2, length=64, max_kl=1e-6)
    assert not list(tmp_path.iterdir())


def test_widths_that_do_not_fit(tmp_path):
    source = model(tmp_path / "narrow", DENSE | {"intermediate_size": 72, "num_hidden_layers": 1})
    with pytest.raises(UserError, match=r"mlp\.down_proj\.weight has 72 inputs; GPTQ needs a multiple of 32"):
        checkpoint.write_gptq(source, tmp_path / "out", TEXT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "gptq"], "--to gptq needs --text FILE"),
        (["--to", "hf", "--text", "x"], "--text belongs to --to gptq"),
        (["--to", "gptq", "--text", "nothing.txt"], "nothing.txt cannot be read"),
        (["--to", "gptq", "--text", "x", "--dtype", "q8_0"], "do not belong to --to gptq"),
        (["--to", "gptq", "--text", str(TEXT), "--length", "2"], "give at least 2 of 16"),
        (["--to", "gptq", "--plan", "2"], "there is no plan for gptq"),
    ],
)
def test_the_command_refuses(tmp_path, capsys, flags, message):
    assert main(["convert", "demo", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- text


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(DEMO)


def test_rows_of_a_text(tmp_path, tokenizer):
    text = "A line of text, 12 words long or so.\n" * 40
    (tmp_path / "a.txt").write_text(text)
    ids = tokenizer.encode(text)
    np.testing.assert_array_equal(token_rows(tmp_path / "a.txt", tokenizer, 3, 50), np.array(ids[:150]).reshape(3, 50))
    assert token_rows(tmp_path / "a.txt", tokenizer, 9, 10**6).shape == (2, len(ids) // 2)


def test_rows_of_records(tmp_path, tokenizer):
    chat = [{"role": "user", "content": "What is 27 + 58?"}, {"role": "assistant", "content": "85"}]
    lines = [{"messages": chat}, {"text": "import os\n" * 30}]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    ids = tokenizer.chat_ids(chat, add_generation_prompt=False) + tokenizer.encode(lines[1]["text"])
    np.testing.assert_array_equal(token_rows(tmp_path / "a.jsonl", tokenizer, 2, 20).ravel(), ids[:40])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"short", r"a\.txt has \d+ tokens; at least 32 are needed"),
        ("a.txt", b"\xff\xfe\xff", "is not UTF-8 text"),
        ("a.jsonl", b'{"prompt": "x"}\n', r"line 1 of .* has neither"),
        ("a.jsonl", b"[1]\n", "line 1 of .* array instead of an object"),
        ("a.jsonl", b'{"messages": 3}\n', "line 1 of"),
    ],
)
def test_texts_that_cannot_be_used(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        token_rows(tmp_path / name, tokenizer, 2, 64)


def test_mutated_records(tmp_path, tokenizer, mutations):
    """Lines that somebody else wrote: rows of ids of the vocabulary, or one line that says why not."""
    chat = [{"role": "user", "content": "What is 27 + 58?"}, {"role": "assistant", "content": "85"}]
    good, file = [{"messages": chat, "tools": None}, {"text": "import os and more words " * 9}], tmp_path / "a.jsonl"

    def use():
        rows = token_rows(file, tokenizer, 2, 32)
        assert rows.dtype == np.int32 and rows.min() >= 0 and rows.max() < tokenizer.vocab_size

    for seed in mutations:
        file.write_bytes(mutated_json(seed, good[seed % 2]) + b"\n" + json.dumps(good[1]).encode())
        right_or_refused(seed, use)
