# SPDX-License-Identifier: Apache-2.0
"""Training on answers that the model samples: prompts, rollouts, rewards, the reference model."""
