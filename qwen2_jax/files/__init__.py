# SPDX-License-Identifier: Apache-2.0
"""Writing folders that appear complete or not at all, and that one process builds while others wait."""
