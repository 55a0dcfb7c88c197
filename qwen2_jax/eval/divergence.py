# SPDX-License-Identifier: Apache-2.0
"""How far one checkpoint's next-token distributions are from another's on a text: KL, top-1 agreement, perplexity."""

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
from qwen2_jax.model.kv_cache import CACHE_DTYPES
from qwen2_jax.tokenizer import Tokenizer
from qwen2_jax.validate import choice
from qwen2_jax.weights.forms import FORMS

LENGTH = 1024


class Reference:
    """A checkpoint on a text, computed once, for models to be compared with.

    tokens_NT: int32 [N, T], each row a text of its own. dtype: of its computation, or a form in weights.forms.FORMS of
    its matrices, with everything else in float32. cache_dtype: of keys and values, see ByLayer. progress: (layers
    done, layers).
    """

    def __init__(
        self,
        name: str | Path | Source,
        tokens_NT: np.ndarray,
        dtype: str = "float32",
        progress: Callable[[int, int], object] | None = None,
        cache_dtype: str | None = None,
    ):
        model = by_layer(name, dtype, cache_dtype)
        if tokens_NT.max() >= (size := model.config.vocab_size):
            raise UserError(f"the text has the token id {tokens_NT.max()}, and the model {size} tokens")
        self.config, self.tokens_NT = model.config, tokens_NT
        with jax.default_matmul_precision("highest"):
            self.hidden_NTD = model.hidden(tokens_NT, progress)
        self.head_VD = model.head()

    def divergence(
        self,
        name: str | Path | Source,
        dtype: str = "float32",
        progress: Callable[[int, int], object] | None = None,
        cache_dtype: str | None = None,
    ) -> Divergence:
        """Of another checkpoint from this one, at every position. dtype, cache_dtype: as for this one.

        Raises UserError where the vocabularies have different sizes.
        """
        model = by_layer(name, dtype, cache_dtype)
        sizes = self.config.vocab_size, model.config.vocab_size
        if sizes[0] != sizes[1]:
            raise UserError(f"the models have {sizes[0]} and {sizes[1]} tokens; only models of one vocabulary compare")
        with jax.default_matmul_precision("highest"):
            hidden_NTD = model.hidden(self.tokens_NT, progress)
            return divergence(self.hidden_NTD, self.head_VD, hidden_NTD, model.head(), self.tokens_NT)


def by_layer(name: str | Path | Source, dtype: str, cache_dtype: str | None) -> ByLayer:
    """The model of a checkpoint. Raises UserError for an unknown dtype."""
    choice("dtype", dtype, (*DTYPES, *FORMS))
    if cache_dtype is not None:
        choice("cache_dtype", cache_dtype, CACHE_DTYPES)
    return ByLayer(name, dtype, cache_dtype)


def compare_on_text(
    reference: str | Path | Source,
    model: str | Path | Source,
    text: str | Path,
    *,
    tokens: int = 8 * LENGTH,
    length: int = LENGTH,
    dtypes: tuple[str, str] = ("float32", "float32"),
    cache_dtypes: tuple[str | None, str | None] = (None, None),
    progress: Callable[[int, int], object] | None = None,
) -> Divergence:
    """The divergence of `model` from `reference` on the first `tokens` tokens of a text file, in rows of `length`.

    Both are run a layer at a time. text: see token_rows. dtypes, cache_dtypes: of both, see Reference. progress:
    (layers done, layers in all).
    """
    source = locate(reference)
    with source.folder_of_small_files() as folder:
        tokenizer = Tokenizer.from_folder(folder)
    rows = token_rows(text, tokenizer, max(2, tokens // max(1, length)), length)
    report = progress or (lambda done, total: None)
    first = Reference(source, rows, dtypes[0], lambda done, layers: report(done, 2 * layers), cache_dtypes[0])
    return first.divergence(model, dtypes[1], lambda done, layers: report(layers + done, 2 * layers), cache_dtypes[1])
