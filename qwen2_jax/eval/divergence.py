# SPDX-License-Identifier: Apache-2.0
"""How far one checkpoint's next-token distributions are from another's on a text: KL divergence, top-1 agreement."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from qwen2_jax.checkpoint.by_layer import ByLayer
from qwen2_jax.checkpoint.sources import Source, locate
from qwen2_jax.checkpoint.token_rows import token_rows
from qwen2_jax.config.model_config import DTYPES
from qwen2_jax.errors import UserError
from qwen2_jax.model.divergence import Divergence, divergence
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.validate import choice
from qwen2_jax.weights.int8 import to_int8

LENGTH = 1024
FORMS = {"int8": to_int8}  # stored forms of weight matrices, with everything else in float32


def compare(
    reference: str | Path | Source,
    model: str | Path | Source,
    tokens_NT: np.ndarray,
    *,
    dtype: str = "float32",
    progress: Callable[[int, int], object] | None = None,
) -> Divergence:
    """The divergence of `model` from `reference` at every position of int32 tokens [N, T], each row a text of its own.

    The reference is computed in float32; dtype: of the model, or a form in FORMS of its matrices. Both are run a layer
    at a time. progress: (layers done, layers in all). Raises UserError where the vocabularies have different sizes.
    """
    choice("dtype", dtype, (*DTYPES, *FORMS))
    p = ByLayer(reference)
    q = ByLayer(model, "float32" if dtype in FORMS else dtype, FORMS.get(dtype))
    sizes = p.config.vocab_size, q.config.vocab_size
    if sizes[0] != sizes[1]:
        raise UserError(f"the models have {sizes[0]} and {sizes[1]} tokens; only models of one vocabulary compare")
    if tokens_NT.max() >= sizes[0]:
        raise UserError(f"the text has the token id {tokens_NT.max()}, and the models {sizes[0]} tokens")
    layers = p.config.num_hidden_layers, q.config.num_hidden_layers
    report = progress or (lambda done, total: None)
    with jax.default_matmul_precision("highest"):
        p_NTD = p.hidden(tokens_NT, lambda done, _: report(done, sum(layers)))
        q_NTD = q.hidden(tokens_NT, lambda done, _: report(layers[0] + done, sum(layers)))
        return divergence(p_NTD, p.head(), q_NTD, q.head())


def compare_on_text(
    reference: str | Path | Source,
    model: str | Path | Source,
    text: str | Path,
    *,
    tokens: int = 8 * LENGTH,
    length: int = LENGTH,
    dtype: str = "float32",
    progress: Callable[[int, int], object] | None = None,
) -> Divergence:
    """As `compare`, on the first `tokens` tokens of a text file in rows of `length`; see token_rows."""
    source = locate(reference)
    with source.folder_of_small_files() as folder:
        tokenizer = Tokenizer.from_folder(folder)
    rows = token_rows(text, tokenizer, max(2, tokens // max(1, length)), length)
    return compare(source, model, rows, dtype=dtype, progress=progress)
