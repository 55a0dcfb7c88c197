# SPDX-License-Identifier: Apache-2.0
"""Training data: sources of records, their formats, tokenised stores, packing, batches."""
