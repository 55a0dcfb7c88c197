# SPDX-License-Identifier: Apache-2.0
"""From documents to batches: token ids, loss masks, stores, packing, the loader."""
