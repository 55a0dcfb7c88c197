# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter folders: names, shapes, there and back, and every refusal."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import tiny
from mutations import declare_once, mutated_json, right_or_refused
from qwen2_jax.checkpoint import CheckpointError, Source, load_params, locate
from qwen2_jax.checkpoint.peft import load_peft, other_base, save_peft, weights_sha256
from qwen2_jax.errors import UserError
from qwen2_jax.infer.lm import load
from qwen2_jax.model import declare, decoder, lora
from qwen2_jax.model.lora import Lora
from qwen2_jax.weights.params import leaves
from tolerance import assert_no_worse

DENSE, MIXED = tiny.CONFIGS["dense"], tiny.CONFIGS["moe_mixed"]
SETTINGS = Lora(rank=4, alpha=6.0)
KINDS = np.float32, np.float64
REPORTS = Path(__file__).parents[3] / "shared" / "data" / "reports"


def random_adapters(config, settings=SETTINGS, *, unroll=False):
    """Other values in every tensor; the same stacked and unrolled."""

    def values(spec):
        one = lambda layer: np.random.default_rng([layer, *spec.hf.encode()]).normal(size=spec.shape[1:])
        return np.stack([one(layer) for layer in spec.layers]).astype(np.float32)

    return jax.tree.map(values, lora.declare(config, settings, unroll=unroll))


def names_and_shapes(config) -> dict[str, tuple[int, ...]]:
    """What PEFT writes for all targets, spelled out here independently of the package."""
    D, wide = config.hidden_size, config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    out = {}
    for layer in range(config.num_hidden_layers):
        sparse = config.is_sparse(layer)
        ffn = "mlp.shared_expert" if sparse else "mlp"
        F = config.shared_expert_intermediate_size if sparse else config.intermediate_size
        widths = {
            "self_attn.q_proj": (D, wide), "self_attn.k_proj": (D, narrow), "self_attn.v_proj": (D, narrow),
            "self_attn.o_proj": (wide, D), f"{ffn}.gate_proj": (D, F), f"{ffn}.up_proj": (D, F),
            f"{ffn}.down_proj": (F, D),
        }  # fmt: skip
        for module, (inputs, outputs) in widths.items():
            name = f"base_model.model.model.layers.{layer}.{module}"
            out |= {f"{name}.lora_A.weight": (4, inputs), f"{name}.lora_B.weight": (outputs, 4)}
    return out


@pytest.fixture
def folder(tmp_path):
    return save_peft(tmp_path / "adapter", DENSE, random_adapters(DENSE), SETTINGS, "someone/base")


def rewrite(folder, *, config=None, tensors=None):
    """Changes files of a folder: keys of its config, tensors (None removes one)."""
    for file, change, read, write in (
        ("adapter_config.json", config, lambda f: json.loads(f.read_text()), lambda d, f: f.write_text(json.dumps(d))),
        ("adapter_model.safetensors", tensors, load_file, save_file),
    ):
        if change is not None:
            data = read(folder / file) | change
            write(
                {key: value for key, value in data.items() if value is not None or file.endswith(".json")},
                folder / file,
            )


@pytest.mark.parametrize("config", [DENSE, MIXED], ids=["dense", "mixed"])
def test_there_and_back(config, tmp_path):
    adapters = random_adapters(config)
    save_peft(tmp_path / "a", config, adapters, SETTINGS, "someone/base")
    save_peft(tmp_path / "b", config, random_adapters(config, unroll=True), SETTINGS, "someone/base")
    assert {f.name for f in tmp_path.iterdir()} == {"a", "b"}
    assert {f.name for f in (tmp_path / "a").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    assert {name: array.shape for name, array in tensors.items()} == names_and_shapes(config)
    for unroll in (False, True):
        settings, again = load_peft(tmp_path / "a", config, unroll=unroll)
        assert (settings.rank, settings.alpha, settings.rslora) == (4, 6.0, False)
        want = dict(leaves(random_adapters(config, settings, unroll=unroll)))
        assert want.keys() == dict(leaves(again)).keys()
        for path, value in leaves(again):
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, want[path])
    assert config is MIXED or settings == SETTINGS


def test_tensors_are_the_products_factors(folder):
    """The file's B A, [out, in] as torch keeps weights, is what merge adds."""
    tensors = load_file(folder / "adapter_model.safetensors")
    params = tiny.random_params(DENSE)
    merged = lora.merge(params, load_peft(folder, DENSE)[1], SETTINGS)
    for part, weight, module in (
        ("attention", "wo_DNH", "self_attn.o_proj"),
        ("attention", "wk_KHD", "self_attn.k_proj"),
    ):
        before, after = (np.asarray(tree["stacks"][0]["blocks"][0][part][weight][1]) for tree in (params, merged))
        a, b = (tensors[f"base_model.model.model.layers.1.{module}.lora_{x}.weight"] for x in "AB")
        before, after = (x.reshape(len(b), -1) for x in (before, after))
        plain, exact = (before.astype(kind) + b.astype(kind) @ a.astype(kind) * kind(6 / 4) for kind in KINDS)
        assert np.abs(exact - before).max() > 1
        assert_no_worse(after, plain, exact)


def test_the_config_file_is_one_that_peft_reads(folder):
    data = json.loads((folder / "adapter_config.json").read_text())
    assert data["peft_type"] == "LORA" and data["task_type"] == "CAUSAL_LM" and data["r"] == 4
    assert data["lora_alpha"] == 6 and type(data["lora_alpha"]) is int
    assert data["target_modules"] == list(SETTINGS.targets) and data["base_model_name_or_path"] == "someone/base"


def test_targets_never_mean_the_routed_experts_to_peft(tmp_path):
    """PEFT adapts whatever ends with a target's name, experts.0.gate_proj too."""
    save_peft(tmp_path / "a", MIXED, random_adapters(MIXED), SETTINGS, "someone/base")
    targets = json.loads((tmp_path / "a/adapter_config.json").read_text())["target_modules"]
    assert sorted(targets) == sorted(
        [f"{x}_proj" for x in "qkvo"]
        + [f"mlp.{kind}{x}_proj" for kind in ("", "shared_expert.") for x in ("gate", "up", "down")]
    )


def test_half_precision_and_patterns_are_read(folder):
    rewrite(
        folder,
        config={"target_modules": r"model\..*\.(q_proj|k_proj)", "lora_dropout": 0.1, "use_rslora": True},
        tensors={n: a.astype(np.float16) if "q_proj" in n else None if "k_proj" not in n else a
                 for n, a in load_file(folder / "adapter_model.safetensors").items()},
    )  # fmt: skip
    settings, adapters = load_peft(folder, DENSE)
    assert set(settings.targets) == {"self_attn.q_proj", "self_attn.k_proj"} and settings.scale == 3.0
    assert {value.dtype for _, value in leaves(adapters)} == {np.dtype(np.float32)}


def test_full_names_of_modules_are_read():
    """An adapter of two modules of one layer, as PEFT wrote it, against what PEFT computes."""
    folder = REPORTS / "peft-full-names"
    if not folder.exists():
        pytest.skip(f"{folder} is not here")
    expected = json.loads((folder / "expected.json").read_text())
    lm = load(folder / "base", dtype="float32")
    settings, adapters = load_peft(folder / "adapter", lm.config)
    assert set(settings.targets) == {"self_attn.q_proj", "mlp.up_proj"}
    params = load_params(folder / "base", lm.config, dtype="float32")
    graphdef = declare(lm.config)[0]
    ids = np.asarray([expected["ids"]])
    qwen2 = nnx.merge(graphdef, lora.merge(params, adapters, settings))
    logprobs = jax.nn.log_softmax(qwen2.logits(qwen2(ids[:, :-1]).hidden_BTD))
    got = np.take_along_axis(np.asarray(logprobs), ids[:, 1:, None], axis=-1)[..., 0]
    np.testing.assert_allclose(got, [expected["logprobs"]], atol=1e-4)  # the bar against transformers in float32


@pytest.mark.parametrize(
    ("change", "kept"),
    [
        ({"target_modules": ["layers.1.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]}, {"1.q", "0.k"}),
        ({"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [0, 2]}, {"0.q", "0.k", "2.q", "2.k"}),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, {"1.q"}),
        ({"target_modules": ["model.layers.2.self_attn.q_proj", "k_proj"], "layers_to_transform": [0]}, {"2.q", "0.k"}),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj", "layers.1.self_attn.q_proj"]},
         {"0.q", "2.q"}),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": ".*"}, {"0.q", "1.k"}),
        ({"target_modules": "(a+)+$"}, {"2.k", "0.q"}),
    ],
)  # fmt: skip
def test_modules_without_an_adapter_have_one_of_zeros(folder, change, kept):
    tensors = load_file(folder / "adapter_model.safetensors")
    held = {name: name.split(".")[4] + "." + name.split(".")[6][0] for name in tensors if "self_attn" in name}
    rewrite(folder, config=change, tensors={name: a if held.get(name) in kept else None for name, a in tensors.items()})
    settings, adapters = load_peft(folder, DENSE)
    full = random_adapters(DENSE, settings)
    assert {target[-6] for target in settings.targets} == {one[-1] for one in kept}
    for path, value in leaves(adapters):
        whole = dict(leaves(full))[path]
        for layer in range(DENSE.num_hidden_layers):
            there = f"{layer}.{path[-2][1]}" in kept
            np.testing.assert_array_equal(value[layer], whole[layer] if there else np.zeros_like(whole[layer]))
    if not isinstance(change["target_modules"], str) and change.get("exclude_modules") != ".*":
        some = next(name for name, one in held.items() if one in kept)
        rewrite(folder, tensors={some: None})
        with pytest.raises(CheckpointError, match=r"missing \(1\): base_model"):
            load_peft(folder, DENSE)


def test_adapters_of_another_base_are_named(tmp_path, monkeypatch):
    """By the weights' hashes where both are known, else by names, which people write in several ways."""
    demo = locate("demo")
    settings = Lora(rank=1, alpha=2.0, targets=("q_proj",))

    def warned(recorded, name, source=demo, sha=None):
        folder = save_peft(
            tmp_path / "a", DENSE, random_adapters(DENSE, settings), settings, recorded, base_sha256=sha, replace=True
        )
        return other_base(folder, name, source)

    text = warned("Qwen/Qwen2-0.5B-Instruct", "demo")
    assert text.startswith(
        f"{tmp_path / 'a'} was trained on Qwen/Qwen2-0.5B-Instruct, and this run's weights are demo's: "
    )
    assert "start.checkpoint" in text and "\n" not in text
    (tmp_path / "models--Qwen--Qwen2-7B" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    for recorded, name in (
        ("Qwen/Qwen2-7B", "qwen2-7b"), ("qwen2-7b", "qwen/qwen2-7b"), ("base", f"{tmp_path}/base/"), ("./base", "link"),
        ("Qwen/Qwen2-7B", tmp_path / "models--Qwen--Qwen2-7B/snapshots/1"), ("", "demo"), ("demo", demo.path),
    ):  # fmt: skip
        assert warned(recorded, str(name)) is None
    assert warned("qwen2-7b", "qwen2-7b-instruct") and warned("base", "base2")
    assert warned("Qwen/Qwen2-7B-Instruct", "qwen2-7b-instruct-awq")
    assert warned("Qwen/Qwen2-7B-Instruct-AWQ", "qwen2-7b-instruct-awq") is None
    here = weights_sha256(demo)
    assert len(here) == 64 and warned("elsewhere/demo", "demo", sha=here) is None
    assert "was trained on demo, and" in warned("demo", "demo", sha="0" * 64)  # other weights under the same name
    assert warned("demo", "demo", Source("hf", tmp_path / "base"), sha="0" * 64) is None  # a base without hashes
    assert load_peft(tmp_path / "a", DENSE)[0] == settings


@pytest.mark.filterwarnings("ignore:the config has")
def test_mutations(mutations, tmp_path, monkeypatch):
    """Of adapter_config.json, of the header, and of the names of the tensors: the adapters that it means, or a line."""
    declare_once(monkeypatch, decoder)
    settings = Lora(rank=2, alpha=4.0, targets=("q_proj",))
    good = save_peft(tmp_path / "good", DENSE, random_adapters(DENSE, settings), settings, "someone/base")
    config = json.loads((good / "adapter_config.json").read_text())
    config |= {
        "exclude_modules": ["v_proj"],
        "layers_to_transform": [0, 1, 2],
        "layers_pattern": None,
        "revision": None,
    }
    content = (good / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    for seed in mutations:
        if seed % 2:
            (good / "adapter_config.json").write_bytes(mutated_json(seed // 2, config))
        else:
            text = mutated_json(seed // 2, header)
            (good / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
        found = right_or_refused(seed, lambda: load_peft(good, DENSE))
        if not isinstance(found, UserError):
            assert all(np.isfinite(value).all() for _, value in leaves(found[1])) and np.isfinite(found[0].scale)
        (good / "adapter_config.json").write_text(json.dumps(config))
        (good / "adapter_model.safetensors").write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \['lm_head'\]"),
        ({"bias": "all"}, "bias = 'all' \\(only none"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_to_transform": [0, 1]}, r"exclude_modules and layers_to_transform \(14\): base_model"),
        ({"layers_to_transform": "all"}, "layers_to_transform is 'all'; it must be a list of numbers"),
        ({"exclude_modules": 7}, "exclude_modules is 7; it must be a list of names"),
        ({"layers_pattern": ["h"]}, r"layers_pattern = \['h'\] \(only"),
        ({"use_rslora": "no"}, "use_rslora = 'no' \\(only"),
        ({"target_modules": ["model.layers.7.self_attn.q_proj"]}, "targets has 'model.layers.7.self_attn.q_proj'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"a_feature_of_tomorrow": 1}, "a_feature_of_tomorrow"),
        ({"peft_type": "LOHA", "fan_in_fan_out": True}, "fan_in_fan_out = True, peft_type = 'LOHA'"),
        ({"r": "4"}, "rank is '4'"),
        ({"target_modules": None}, "target_modules is None"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "'embed_tokens'; this model can adapt self_attn.k_proj"),
        ({"target_modules": ["q_proj"]}, r"unexpected \(36\): base_model"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_the_config_asks_for_is_done_or_refused(folder, change, message):
    rewrite(folder, config=change)
    with pytest.raises(CheckpointError, match=message):
        load_peft(folder, DENSE)


def test_everything_wrong_with_the_tensors_is_in_one_error(folder):
    name = "base_model.model.model.layers.{}.self_attn.{}.lora_A.weight".format
    rewrite(
        folder,
        tensors={
            name(0, "q_proj"): None,
            name(1, "q_proj"): np.zeros((4, 5), np.float32),
            name(7, "q_proj"): np.zeros((4, 48), np.float32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_peft(folder, DENSE)
    assert f"missing (1): {name(0, 'q_proj')}" in str(caught.value)
    assert f"unexpected (1): {name(7, 'q_proj')}" in str(caught.value)
    assert f"{name(1, 'q_proj')} is [4, 5], the config says [4, 48]" in str(caught.value)


def test_a_file_cut_short_is_told(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        load_peft(folder, DENSE)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="has no adapter_config.json"):
        load_peft(tmp_path, DENSE)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="adapter_model.safetensors; adapters saved as pickle"):
        load_peft(folder, DENSE)


def test_adapters_of_another_shape_are_not_written(tmp_path):
    with pytest.raises(CheckpointError, match="do not fit"):
        save_peft(tmp_path / "a", DENSE, random_adapters(DENSE), Lora(rank=5), "someone/base")
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    (tmp_path / "a/file").touch()
    with pytest.raises(CheckpointError, match="exists already"):
        save_peft(tmp_path / "a", DENSE, random_adapters(DENSE), SETTINGS, "someone/base")
