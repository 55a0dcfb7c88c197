# SPDX-License-Identifier: Apache-2.0
"""Parsers for records: plain text, conversations, ranked responses, prompts."""
