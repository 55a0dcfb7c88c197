# SPDX-License-Identifier: Apache-2.0
"""The bundled demo checkpoint: a Hugging Face folder, described in its README.md."""
