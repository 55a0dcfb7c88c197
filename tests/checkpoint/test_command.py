# SPDX-License-Identifier: Apache-2.0
"""python -m qwen2_jax.checkpoint: what it prints and how it exits."""

import json
import os
import subprocess
import sys

import pytest

import checkpoint.hf_folders as hf
from qwen2_jax.checkpoint.__main__ import main
from qwen2_jax.checkpoint.console import readable_bytes


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
