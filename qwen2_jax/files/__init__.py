# SPDX-License-Identifier: Apache-2.0
"""Files: JSON that others wrote, folders that appear complete or not at all, and that one process builds for all."""
