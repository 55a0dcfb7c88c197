# SPDX-License-Identifier: Apache-2.0
"""From names to folders: presets, Hub ids, folders, the demo; and what is said when there is nothing."""

import fnmatch
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

import checkpoint.hf_folders as hf
from qwen2_jax import checkpoint
from qwen2_jax.checkpoint import sources
from qwen2_jax.config import HUB_IDS, presets


def test_local_folders(tmp_path, dense, monkeypatch):
    checkpoint.convert(dense, tmp_path / "orbax", "orbax")
    assert checkpoint.locate(dense) == checkpoint.Source("hf", dense)
    assert checkpoint.locate(tmp_path / "orbax").kind == "orbax"
    source = checkpoint.locate(str(dense))
    assert checkpoint.locate(source) is source
    assert checkpoint.read_config(source).num_hidden_layers == 3
    assert source.read_json("generation_config.json") == {"eos_token_id": [1, 2], "top_p": 0.8}
    assert source.read_json("nothing.json") is None
    assert source.read_bytes("nothing.json") is None
    monkeypatch.chdir(tmp_path)  # Orbax needs absolute paths, users do not
    checkpoint.load_params("orbax")


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [*HUB_IDS.items(), ("QWEN2-72B", "Qwen/Qwen2-72B"), ("some-one/a.model_x", "some-one/a.model_x")],
)
def test_names_become_hub_ids(tmp_path, dense, monkeypatch, name, hub_id):
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        asked.append(repo_id)
        assert not any(p.endswith((".bin", ".py", ".pt")) for p in allow_patterns)
        return str(dense)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint.locate(name).path == dense
    assert asked == [hub_id]


OFFICIAL = {
    "qwen2-7b-instruct-gptq-int4": "Qwen/Qwen2-7B-Instruct-GPTQ-Int4",
    "qwen2-0.5b-instruct-gptq-int8": "Qwen/Qwen2-0.5B-Instruct-GPTQ-Int8",
    "Qwen2-72B-Instruct-AWQ": "Qwen/Qwen2-72B-Instruct-AWQ",
    "qwen2-57b-a14b-instruct-gptq-int4": "Qwen/Qwen2-57B-A14B-Instruct-GPTQ-Int4",
    "qwen1.5-moe-a2.7b-chat-gptq-int4": "Qwen/Qwen1.5-MoE-A2.7B-Chat-GPTQ-Int4",
    "qwen2.5-32b-instruct-awq": "Qwen/Qwen2.5-32B-Instruct-AWQ",
}


@pytest.mark.parametrize(("name", "hub_id"), OFFICIAL.items())
def test_names_of_quantised_checkpoints(dense, monkeypatch, name, hub_id):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo_id, **_: asked.append(repo_id) or str(dense))
    assert checkpoint.locate(name).path == dense
    assert asked == [hub_id]


def test_what_is_not_published_has_no_name():
    """The 57B mixture has no AWQ or Int8, base models and those of a million tokens have no quantised form."""
    for name in ("57b-a14b-instruct-awq", "57b-a14b-instruct-gptq-int8", "7b-awq", "7b-gptq-int4"):
        assert f"qwen2-{name}" not in presets.QUANTISED_HUB_IDS
    assert not any("-1m-" in name for name in presets.QUANTISED_HUB_IDS)
    with pytest.raises(checkpoint.CheckpointError, match="no model of that name"):
        checkpoint.locate("qwen2-57b-a14b-instruct-awq")


@pytest.mark.parametrize(
    ("name", "files", "hub_id"),
    [
        ("qwen2-7b-instruct-gguf:q4_k_m", ["qwen2-7b-instruct-q4_k_m.gguf"], "Qwen/Qwen2-7B-Instruct-GGUF"),
        ("qwen2-0.5b-instruct-gguf:Q8_0", ["qwen2-0_5b-instruct-q8_0.gguf"], "Qwen/Qwen2-0.5B-Instruct-GGUF"),
        ("Qwen/Qwen2-7B-Instruct-GGUF:fp16", ["qwen2-7b-instruct-fp16.gguf"], "Qwen/Qwen2-7B-Instruct-GGUF"),
        ("some/a-GGUF:q4_k_m", ["a.Q4_K_M.gguf", "a.Q4_K_S.gguf"], "some/a-GGUF"),
        (
            "qwen2-72b-instruct-gguf:q4_k_m",
            [f"qwen2-72b-instruct-q4_k_m-0000{n}-of-00002.gguf" for n in (1, 2)] + ["qwen2-72b-instruct-q2_k.gguf"],
            "Qwen/Qwen2-72B-Instruct-GGUF",
        ),
    ],
)
def test_gguf_files_of_a_repository(tmp_path, monkeypatch, name, files, hub_id):
    """One type is asked for and taken, also where others were downloaded before; of parts the first."""

    def snapshot_download(repo_id, allow_patterns):
        assert repo_id == hub_id
        wanted = [f for f in files if any(fnmatch.fnmatchcase(f, p) for p in allow_patterns)]
        assert wanted and all("q2_k" not in f and "Q4_K_S" not in f for f in wanted)
        for file in files:
            (tmp_path / file).write_bytes(b"GGUF")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert checkpoint.locate(name) == checkpoint.Source("gguf", tmp_path / files[0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen2-7b-instruct-gguf", "put one behind a colon: qwen2-7b-instruct-gguf:q4_k_m"),
        ("Qwen/Qwen2-7B-Instruct-GGUF", "put one behind a colon: Qwen/Qwen2-7B-Instruct-GGUF:q4_k_m"),
        ("qwen2-7b-instruct-gguf:../x", "put one behind a colon"),
        ("qwen2-7b-instruct-gguf:q9_z", "has no file of the type 'q9_z'"),
        ("qwen2-7b-instruct-gptq-int5", "did you mean qwen2-7b-instruct-gptq-int"),
    ],
)
def test_gguf_types_that_are_not_there(tmp_path, monkeypatch, name, said):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.locate(name)
    assert said in str(error.value)


def test_a_folder_of_that_name_wins(tmp_path, dense, monkeypatch):
    shutil.copytree(dense, tmp_path / "Qwen" / "Qwen2-7B")
    monkeypatch.chdir(tmp_path)
    assert checkpoint.locate("Qwen/Qwen2-7B").path == Path("Qwen/Qwen2-7B")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            errors.LocalEntryNotFoundError("offline"),
            "cannot be reached and no complete copy of Qwen/Qwen2-7B is on this machine",
        ),
        (OSError("disk"), "downloading Qwen/Qwen2-7B failed (disk); run again to resume"),
    ],
)
def test_no_download(monkeypatch, raised, said):
    def snapshot_download(*_, **__):
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.locate("qwen2-7b")
    assert said in str(error.value)
    assert "give a local folder" in str(error.value)


@pytest.mark.parametrize("name", ["qwen2-72b", "qwen2-72b-instruct-gptq-int4", "qwen2-72b-instruct-gguf:q4_k_m"])
def test_offline(tmp_path, monkeypatch, name):
    """The real client, told to stay offline, with an empty cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="cannot be reached .*give a local folder"):
        checkpoint.locate(name)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen2-7b-instuct", "did you mean qwen2-7b-instruct"),
        ("qwen2_0.5b", "did you mean qwen2-0.5b"),
        ("", "is empty"),
        ("llama-3", "a preset: qwen1.5-moe-a2.7b"),
        ("/nowhere/at/all", "there is no folder '/nowhere/at/all'"),
    ],
)
def test_misspelt(name, said):
    with pytest.raises(FileNotFoundError) as error:
        checkpoint.locate(name)
    assert said in str(error.value)
    assert isinstance(error.value, ValueError)


def test_misspelt_folder(dense):
    with pytest.raises(FileNotFoundError, match="did you mean .*dense"):
        checkpoint.locate(str(dense) + "s")


def test_folders_without_checkpoint(tmp_path, dense):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.locate(tmp_path / "empty")
    with pytest.raises(checkpoint.CheckpointError, match=f"no .gguf file; of another format, give the folder: {dense}"):
        checkpoint.locate(dense / "config.json")
    (dense / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        checkpoint.load_params(dense)


def test_demo_is_in_the_package(monkeypatch, dense):
    monkeypatch.setattr(
        sources.importlib.resources, "files", lambda package: dense if package == "qwen2_jax.demo" else None
    )
    assert checkpoint.locate("demo") == checkpoint.Source("hf", dense)


def test_code_does_not_travel(tmp_path, dense):
    (dense / "modeling.py").write_text("print('never')")
    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    checkpoint.convert(dense, tmp_path / "a", "orbax")
    checkpoint.convert(tmp_path / "a", tmp_path / "b", "hf")
    assert not (tmp_path / "b" / "modeling.py").exists()
    assert (tmp_path / "b" / "additional_chat_templates" / "rag.jinja").read_text() == "{{ x }}"
    assert json.loads((tmp_path / "b" / "config.json").read_text()) == hf.DENSE
