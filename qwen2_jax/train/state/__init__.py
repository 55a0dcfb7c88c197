# SPDX-License-Identifier: Apache-2.0
"""The state of a run on disk: checkpoints, what resuming requires, locks, preemption."""
