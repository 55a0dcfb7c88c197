# SPDX-License-Identifier: Apache-2.0
"""The demo checkpoint's speedrun: its corpus and chat skills, the measurements of its stages, and its reports."""
