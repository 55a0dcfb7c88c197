# SPDX-License-Identifier: Apache-2.0
"""Text and chat data: sources, synthetic skills, the byte-level BPE they are written in, packed batches."""
