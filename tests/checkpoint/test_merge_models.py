# SPDX-License-Identifier: Apache-2.0
"""Merges of checkpoints against numpy, and what is refused."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

import checkpoint.hf_folders as hf
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import merge_models as merging
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.checkpoint.merge_models import Merge, merge
from qwen2_jax.errors import UserError

NAME = "model.layers.1.mlp.experts.2.down_proj.weight"


def as32(x):
    return np.asarray(x, np.float32)


@pytest.fixture
def folders(tmp_path):
    """A base in bfloat16 and two models trained from it, one in float32: (paths, tensors in float32)."""
    base = hf.random_tensors(hf.SPARSE)
    tensors = [base]
    for seed, dtype in ((1, hf.BF16), (2, hf.F32)):
        change = hf.random_tensors(hf.SPARSE, hf.F32, seed)
        tensors.append({n: (as32(x) + 0.1 * change[n]).astype(dtype) for n, x in base.items()})
    paths = [
        hf.write_folder(tmp_path / name, hf.SPARSE, part, shards=shards)
        for name, part, shards in zip(("base", "one", "two"), tensors, (1, 2, 1), strict=True)
    ]
    return paths, [{n: as32(x) for n, x in part.items()} for part in tensors]


def largest(x, keep):
    """All but the k-th largest magnitudes and larger ones set to 0."""
    k = max(1, int(keep * x.size))
    return np.where(np.abs(x) >= np.sort(np.abs(x), axis=None)[-k], x, 0)


def signed_mean(parts, weights):
    """By the definition, entry by entry."""
    out = np.zeros(parts[0].size)
    for i, values in enumerate(zip(*(p.reshape(-1) for p in parts), strict=True)):
        total = sum(w * v for w, v in zip(weights, values, strict=True))
        same = [(w, v) for w, v in zip(weights, values, strict=True) if v * total > 0]
        if same:
            out[i] = sum(w * v for w, v in same) / sum(w for w, _ in same)
    return out.reshape(parts[0].shape)


@pytest.mark.parametrize("block", [1 << 20, 7])
@pytest.mark.parametrize("weights", [None, (0.25, 1.0)])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_equals_numpy(folders, tmp_path, monkeypatch, method, weights, block):
    """Every tensor, in one block and in many."""
    monkeypatch.setattr(merging, "BLOCK", block)
    (base, *models), (old, *new) = folders
    keep = None if method == "linear" else 0.3
    how = Merge(method=method, weights=weights, keep=keep, scale=0.7)
    made = load_file(merge(base, models, tmp_path / "out", how, dtype="float32") / "model.safetensors")
    assert made.keys() == old.keys()
    given = weights or (0.5, 0.5)
    for name, x in old.items():
        parts = [tensors[name] - x for tensors in new]
        if method == "ties":
            tau = signed_mean([largest(p, keep) for p in parts], given)
        else:
            tau = sum(w * p for w, p in zip(given, parts, strict=True))
        # Five roundings to float32 (2^-24 = 6e-8 each): the weighted sum, its scale, the sum with the base.
        np.testing.assert_allclose(made[name], x + 0.7 * tau, rtol=3e-7, atol=3e-7, err_msg=name)


def test_dare_keeps_a_random_share_scaled_up(folders, tmp_path):
    """Entries of the difference are dropped or divided by the share; other seeds, models and tensors draw others."""
    (base, one, _), (old, new, _) = folders
    made = {}
    for seed in (0, 1):
        how = Merge(method="dare_linear", keep=0.25, weights=(1.0, 1.0), seed=seed)
        # One model twice: each draws its own mask.
        out = merge(base, [one, one], tmp_path / str(seed), how, dtype="float32")
        made[seed] = load_file(out / "model.safetensors")
    masks = []
    for name, x in old.items():
        tau = new[name] - x
        times = (made[0][name] - x) / np.where(tau, tau, 1)
        np.testing.assert_allclose(times, np.round(times / 4) * 4, atol=2e-3)  # x + 4 tau rounds in x's last bit
        masks.append(np.where(tau, np.round(times / 4), 0).reshape(-1))
    drawn = np.concatenate(masks)
    for kept, share in ((0, 0.75**2), (1, 2 * 0.25 * 0.75), (2, 0.25**2)):
        assert (drawn == kept).mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / drawn.size) + 2e-3)
    assert not all((made[0][name] == made[1][name]).all() for name in old)
    repeated = merge(base, [one, one], tmp_path / "again", Merge(method="dare_linear", keep=0.25, weights=(1.0, 1.0)))
    again = load_file(repeated / "model.safetensors")
    for name in old:
        np.testing.assert_array_equal(again[name], made[0][name].astype(hf.BF16))


def test_dare_ties_elects_among_what_was_drawn(folders, tmp_path):
    """With everything kept nothing is random, and nothing is looked for: signs and means of whole differences."""
    (base, *models), (old, *new) = folders
    out = merge(base, models, tmp_path / "out", Merge(method="dare_ties", keep=1.0), dtype="float32")
    made = load_file(out / "model.safetensors")[NAME]
    want = old[NAME] + signed_mean([tensors[NAME] - old[NAME] for tensors in new], (0.5, 0.5))
    np.testing.assert_allclose(made, want, rtol=3e-7, atol=3e-7)  # five roundings to float32, as above


def test_the_folder_is_the_bases_with_other_weights(folders, tmp_path):
    (base, *models), _ = folders
    out = merge(base, models, tmp_path / "out", Merge())
    assert not checkpoint.verify(out).damaged
    files = hf.files_of(out)
    assert {n: d for n, d in hf.files_of(base).items() if n != "model.safetensors"}.items() <= files.items()
    assert {x.dtype for x in load_file(out / "model.safetensors").values()} == {hf.BF16}
    # A merge of the base with itself is the base.
    same = merge(base, [base, base], tmp_path / "same", Merge(method="ties"))
    for name, x in load_file(base / "model.safetensors").items():
        np.testing.assert_array_equal(load_file(same / "model.safetensors")[name], x)


def test_a_tied_head_that_one_model_spells_out(tmp_path):
    tensors = hf.random_tensors(hf.TIED)
    base = hf.write_folder(tmp_path / "base", hf.TIED, tensors)
    spelled = hf.write_folder(
        tmp_path / "spelled", hf.TIED, tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"]}
    )
    made = load_file(merge(base, [spelled], tmp_path / "out", Merge()) / "model.safetensors")
    assert made.keys() == tensors.keys()


def test_what_cannot_be_merged(folders, tmp_path, dense):
    (base, one, _), (old, _, _) = folders
    wider = hf.write_folder(tmp_path / "wider", c := hf.SPARSE | {"num_experts_per_tok": 3}, hf.random_tensors(c))
    windows = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    sliding = hf.write_folder(tmp_path / "sliding", hf.SPARSE | windows, hf.random_tensors(hf.SPARSE))
    longer = hf.write_folder(tmp_path / "longer", hf.SPARSE | {"max_position_embeddings": 131072}, old)
    missing = {n: x for n, x in old.items() if n != NAME}
    bad = {n: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x) if n == NAME else x for n, x in old.items()}
    broken = hf.write_folder(tmp_path / "broken", hf.SPARSE, missing)
    nan = hf.write_folder(tmp_path / "nan", hf.SPARSE, {n: as32(x) for n, x in bad.items()})
    misshapen = hf.write_folder(tmp_path / "shape", hf.SPARSE, old | {NAME: old[NAME].T.copy()})
    orbax = checkpoint.convert(base, tmp_path / "orbax", "orbax")
    out = tmp_path / "out"
    for model, says in (
        (dense, "has model_type 'qwen2' and the base 'qwen2_moe'"),
        (wider, "has num_experts_per_tok 3 and the base 2"),
        (sliding, "sliding windows in other layers"),
        (broken, f"missing .*{NAME}"),
        (misshapen, f"wrong shape .*{NAME}"),
        (nan, f"{NAME} of .*nan has numbers that are not finite"),
        (orbax, "convert .* --to hf"),
    ):
        with pytest.raises(UserError, match=says):
            merge(base, [model], out, Merge())
        assert not list(tmp_path.glob("out*"))
    with pytest.raises(UserError, match=f"{NAME} of the base has numbers"):
        merge(nan, [one], out, Merge(method="ties"))
    with pytest.raises(UserError, match="does not fit into float16"):
        merge(base, [one], out, Merge(scale=1e7), dtype="float16")
    assert not list(tmp_path.glob("out*"))
    merge(base, [longer], out, Merge())  # how far positions go is no difference of weights
    with pytest.raises(UserError, match="exists already"):
        merge(base, [longer], out, Merge())


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"method": "slerp"}, "supported: 'linear', 'ties', 'dare_linear', 'dare_ties'"),
        ({"keep": 0.5}, "linear keeps everything"),
        ({"method": "ties", "keep": 0.0}, "above 0 and at most 1"),
        ({"weights": (1.0, -1.0)}, "each must be above 0"),
        ({"weights": (1.0, float("nan"))}, "each must be above 0"),
        ({"scale": float("inf")}, "finite"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_settings_are_checked(fields, says):
    with pytest.raises(UserError, match=says):
        Merge(**fields)


def test_the_command(folders, tmp_path, capsys):
    (base, *models), _ = folders
    out = tmp_path / "out"
    argv = ["merge", str(base), *map(str, models), "--out", str(out), "--method", "dare_ties", "--keep", "0.5"]
    assert main([*argv, "--weights", "1", "2", "--dtype", "float16", "--seed", "3"]) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    want = merge(base, models, tmp_path / "want", Merge(method="dare_ties", keep=0.5, weights=(1, 2), seed=3),
                 dtype="float16")  # fmt: skip
    assert hf.files_of(out) == hf.files_of(want)
    for more, says in ((["--weights", "1"], "1 weights for 2 models"), (["--keep", "2"], "keep is 2.0")):
        assert main(["merge", str(base), *map(str, models), "--out", "x", "--method", "ties", *more]) == 2
        shown = capsys.readouterr()
        assert says in shown.err and shown.err.count("\n") == 1 and shown.out == ""
    with pytest.raises(SystemExit):
        main([*argv[:-4], "--method", "slerp"])
    assert "invalid choice: 'slerp'" in capsys.readouterr().err
