# SPDX-License-Identifier: Apache-2.0
"""python -m qwen2_jax.checkpoint: what it prints and how it exits."""

import json
import os
import subprocess
import sys

import pytest

import checkpoint.hf_folders as hf
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.console import readable_bytes


def test_the_three_commands(tmp_path, dense, capsys):
    out = str(tmp_path / "orbax")
    assert main(["convert", str(dense), out, "--to", "orbax"]) == 0
    assert main(["verify", out]) == 0
    assert "every hash is right" in capsys.readouterr().out
    assert main(["inspect", out, "--arrays"]) == 0
    shown = capsys.readouterr().out
    assert "parameters" in shown
    assert "29,600" in shown
    assert "model.layers.2.mlp.down_proj.weight" in shown
    assert "num_key_value_heads" in shown
    assert main(["verify", str(dense)]) == 0
    assert "no manifest.json" in capsys.readouterr().out
    (tmp_path / "orbax" / "tokenizer.json").write_text("{}")
    assert main(["verify", out]) == 1
    assert "damaged: tokenizer.json: its bytes have changed" in capsys.readouterr().err


def test_mistakes_are_one_line(tmp_path, dense, capsys):
    for argv in (
        ["convert", str(dense), str(dense), "--to", "hf"],
        ["convert", str(dense), str(tmp_path / "x"), "--to", "hf", "--max-shard-gb", "0"],
        ["verify", str(tmp_path / "nothing")],
        ["inspect", str(dense / "config.json")],
    ):
        assert main(argv) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1


def test_plan_shows_what_hosts_read_without_weights(tmp_path, capsys):
    argv = ["convert", "Qwen2-72B", "--to", "orbax", "--plan", "16", "--mesh", "fsdp=16,tensor=4"]
    assert main(argv) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["bytes", "convert", "load"]
    assert main([*argv, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    convert, load = told["steps"]
    size = 2 * 72_706_203_648
    assert told["hosts"] == 16 and len(convert["reads"]) == 16
    assert size <= sum(convert["writes"]) == sum(convert["reads"]) - size < 1.001 * size
    assert max(load["reads"]) < 1.001 * size / 16
    assert max(convert["holds"]) < 2**30 * 2.5  # the embedding


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["demo", "--to", "hf"], "needs a folder to write"),
        (["demo", "x", "--to", "hf", "--json"], "belong to --plan"),
        (["demo", "--to", "hf", "--plan", "0"], "give at least 1"),
        (["demo", "--to", "hf", "--plan", "2", "--mesh", "fsdp=3"], "multiple of 2"),
        (["demo", "--to", "hf", "--plan", "2", "--mesh", "fsdp"], "as in fsdp=16,tensor=4"),
        (["demo", "--to", "hf", "--plan", "2", "--mesh", "fdsp=2"], "choose from"),
        (["qwen2-73b", "--to", "hf", "--plan", "2"], "downloads nothing"),
    ],
)
def test_what_a_plan_cannot_be_made_of(argv, says, capsys):
    assert main(["convert", *argv]) == 2
    assert says in capsys.readouterr().err


def test_as_a_program(dense):
    env = os.environ | {"JAX_PLATFORMS": ""}
    run = [sys.executable, "-m", "qwen2_jax.checkpoint", "inspect", str(dense)]
    result = subprocess.run(run, capture_output=True, text=True, check=True, env=env)
    assert (
        f"folder  {dense}" in " ".join(result.stdout.split(" " * 20)).replace("                           ", "  ")
        or str(dense) in result.stdout
    )
    assert result.stderr == ""


def test_help_teaches(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "exit codes" in text


def test_unknown_config_keys_are_warned_about(dense, capsys):
    (dense / "config.json").write_text(json.dumps(hf.DENSE | {"surprise": 1}))
    assert main(["inspect", str(dense)]) == 0
    assert "warning: the config has surprise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.50 KiB"), (145 * 2**30, "145.00 GiB"), (2**50, "1024.00 TiB")],
)
def test_readable_bytes(n, text):
    assert readable_bytes(n) == text
