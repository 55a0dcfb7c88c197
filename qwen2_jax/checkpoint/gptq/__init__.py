# SPDX-License-Identifier: Apache-2.0
"""Writing GPTQ checkpoints: rounding of a matrix (rounding), layer by layer (calibrate), the new folder (write)."""
