# SPDX-License-Identifier: Apache-2.0
"""Upcycling: a mixture of experts made from a dense model, and how well it keeps the dense model's function."""
