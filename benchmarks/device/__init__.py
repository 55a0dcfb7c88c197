# SPDX-License-Identifier: Apache-2.0
"""Proves one accelerator: every kernel right and timed, the model run and trained on it. See __main__.py."""
