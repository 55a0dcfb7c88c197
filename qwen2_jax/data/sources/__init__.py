# SPDX-License-Identifier: Apache-2.0
"""Readers of data files: JSON Lines, text, Parquet, Arrow, ArrayRecord, with random access."""
