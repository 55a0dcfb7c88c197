# SPDX-License-Identifier: Apache-2.0
"""Qwen2 in JAX."""
