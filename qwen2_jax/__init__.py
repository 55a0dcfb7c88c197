# SPDX-License-Identifier: Apache-2.0
"""Qwen2 in JAX.

    lm = qwen2_jax.load("qwen2-0.5b")
    lm.generate(["Once upon"], max_new_tokens=32)[0].text

Names are imported when they are first used, so `import qwen2_jax` alone imports nothing.
"""

import sys

if sys.version_info < (3, 12):  # noqa: UP036  here, before anything that an older Python cannot even read
    raise SystemExit(
        "error: qwen2-jax needs Python 3.12 or newer, and %s is Python %d.%d.%d: "  # noqa: UP031
        "install a newer one and start it by its name, such as python3.13" % ((sys.executable,) + sys.version_info[:3])  # noqa: RUF005
    )

from typing import TYPE_CHECKING

from qwen2_jax.lazy_exports import lazy_exports
from qwen2_jax.missing_package import explain_missing_package

if TYPE_CHECKING:
    from qwen2_jax.config.model_config import HUB_IDS, PRESETS, ModelConfig
    from qwen2_jax.errors import UserError
    from qwen2_jax.infer.detokenize import Generation
    from qwen2_jax.infer.lm import LM, load

__all__ = ["HUB_IDS", "LM", "PRESETS", "Generation", "ModelConfig", "UserError", "load"]
__version__ = "0.1.0"

explain_missing_package()

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "qwen2_jax.config.model_config": ["HUB_IDS", "ModelConfig", "PRESETS"],
        "qwen2_jax.errors": ["UserError"],
        "qwen2_jax.infer.detokenize": ["Generation"],
        "qwen2_jax.infer.lm": ["LM", "load"],
    },
    {
        "checkpoint": "qwen2_jax.checkpoint",
        "config": "qwen2_jax.config",
        "model": "qwen2_jax.model",
        "rope": "qwen2_jax.model.rope",
        "sharding": "qwen2_jax.parallel.sharding",
        "tokenizer": "qwen2_jax.tokenizer",
    },
)
