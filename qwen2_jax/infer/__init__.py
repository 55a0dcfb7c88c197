# SPDX-License-Identifier: Apache-2.0
"""Inference: the LM class that qwen2_jax.load returns, the engine below it, and the command line above it."""
