# SPDX-License-Identifier: Apache-2.0
"""The stages of training that come with the package, a file each; stage.py says what a stage is."""
