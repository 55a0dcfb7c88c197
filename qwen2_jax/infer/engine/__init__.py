# SPDX-License-Identifier: Apache-2.0
"""Generation over token ids: compiled programs, sampling, memory. It knows nothing of text."""
