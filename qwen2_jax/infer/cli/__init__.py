# SPDX-License-Identifier: Apache-2.0
"""The command line of infer.py: one prompt, a chat, or a file of prompts."""
