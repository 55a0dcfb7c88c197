# SPDX-License-Identifier: Apache-2.0
"""What a record contains: a text, a conversation, ranked responses, a prompt."""
