# SPDX-License-Identifier: Apache-2.0
"""One sentence in place of a traceback where a command is started by a Python that lacks qwen2-jax's dependencies."""

import sys
from pathlib import Path
from types import TracebackType

COMMANDS = ("infer.py", "train.py", "-m")  # "-m": what sys.argv[0] is while `python -m qwen2_jax...` is imported
PACKAGES = (  # by the names that are imported
    "jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "numpy", "ml_dtypes", "safetensors", "tokenizers",
    "jinja2", "huggingface_hub", "tyro", "rich", "grain",
)  # fmt: skip


def explain_missing_package() -> None:
    """Has a dependency that cannot be imported reported in one line, if this process is one of the commands."""
    if Path(sys.argv[0] if sys.argv else "").name in COMMANDS:
        sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    name = (getattr(error, "name", None) or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or name not in PACKAGES:
        sys.__excepthook__(kind, error, trace)
        return
    here = Path(__file__).parents[1] / ".venv" / "bin" / "python"
    if here.exists() and here.parent != Path(sys.executable).parent:
        remedy = f"start it with {here}"
    else:
        remedy = (
            "activate the environment in which you installed qwen2-jax, or install it: python3 -m venv .venv && "
            ".venv/bin/pip install -e . -c constraints.txt, and then start .venv/bin/python"
        )
    print(f"error: {sys.executable} has no package {name}, which qwen2-jax needs: {remedy}", file=sys.stderr)
