# SPDX-License-Identifier: Apache-2.0
"""The stages of training in this package, one file each; stage.py defines the interface."""
