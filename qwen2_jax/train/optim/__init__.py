# SPDX-License-Identifier: Apache-2.0
"""Optimizers, and online merging, which wraps one."""
