# SPDX-License-Identifier: Apache-2.0
"""The forms that a checkpoint has on disk or in memory, and the names of its tensors."""
