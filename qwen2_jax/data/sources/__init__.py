# SPDX-License-Identifier: Apache-2.0
"""Where records come from: JSON Lines, text, Parquet, Arrow, ArrayRecord, with random access."""
