# SPDX-License-Identifier: Apache-2.0
"""Token stores in memory, for tests of packing: every token's id tells where it stands."""

import numpy as np


class MemoryStore:
    """Documents of the given lengths; ids count up from `first`, so an id names its document and place.

    is_target: flags of all tokens; default: all True.
    """

    def __init__(self, lengths, first=0, is_target=None):
        self.offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        total = int(self.offsets[-1])
        self.tokens = np.arange(first, first + total, dtype=np.uint32)
        self.flags = np.ones(total, bool) if is_target is None else np.asarray(is_target, bool)

    @property
    def all_targets(self):
        return bool(self.flags.all())

    def is_target(self, start, stop):
        return self.flags[start:stop]

    def target_counts(self):
        return np.array(
            [self.flags[a + 1 : b].sum() for a, b in zip(self.offsets, self.offsets[1:], strict=False)], int
        )

    ranks = 1

    def begins(self, start, stop):
        return None

    def where(self, document):
        return f"memory line {document + 1}"

    def pairs(self, chosen=lambda length: length >= 2, most=None):
        """(input, target) of every trained token of the chosen documents' first `most` tokens, sorted."""
        found = []
        for a, b in zip(self.offsets.tolist(), self.offsets[1:].tolist(), strict=False):
            if chosen(b - a):
                end = b if most is None else min(b, a + most)
                first = int(self.tokens[0]) if len(self.tokens) else 0
                found += [(first + i - 1, first + i) for i in range(a + 1, end) if self.flags[i]]
        return found


def trained_pairs(rows):
    """(input, target) of every weight that is 1, of all rows."""
    found = []
    for row in rows:
        assert set(np.unique(row.weights_BT)) <= {0, 1}
        here = row.weights_BT == 1
        found += zip(row.tokens_BT[here].tolist(), row.targets_BT[here].tolist(), strict=True)
    return sorted(found)
