# SPDX-License-Identifier: Apache-2.0
"""Parameters: how they are declared, stored and multiplied."""
