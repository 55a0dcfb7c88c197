# SPDX-License-Identifier: Apache-2.0
"""Sampling, generation and the command line: token ids at the bottom, text above."""
