# SPDX-License-Identifier: Apache-2.0
"""The losses of every training stage."""
