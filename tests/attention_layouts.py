# SPDX-License-Identifier: Apache-2.0
"""Random layouts of tokens for the attention tests, as hypothesis draws them."""

from hypothesis import strategies as st

from attention_cases import KINDS, layout

# B, T, S, N, K, H: few shapes, so that few programs are compiled; what varies freely is run-time data.
SHAPES = [(2, 21, 37, 6, 2, 8), (1, 40, 40, 3, 3, 16)]
BLOCKS = {"block_q": 8, "block_k": 16}


@st.composite
def layouts(draw, shapes=SHAPES, chunks=False):
    """(shape, seed, keyword arguments): padding, packed documents or a cache in use; windows and scales per row."""
    shape, seed, kind = draw(st.sampled_from(shapes)), draw(st.integers(0, 2**16)), draw(st.sampled_from(KINDS))
    return shape, seed, layout(kind, seed, shape, windowed=draw(st.booleans()), chunks=chunks)
