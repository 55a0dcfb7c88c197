# SPDX-License-Identifier: Apache-2.0
"""Loss, router statistics and the gradient of every weight are the same on every mesh, packed rows included.

Eight devices, in a process of its own; a model's gradient on one device is computed once.
"""

import pytest

from few import slow


@pytest.mark.parametrize(
    ("case", "meshes"),
    [
        ("heads 14:2", ["context=2 tensor=4"]),
        *slow(("heads 14:2", ["tensor=8", "fsdp=2 tensor=4"])),
        *slow(("heads 28:4", ["tensor=8", "data=2 fsdp=2 tensor=2"])),
        *slow(("heads 6:3", ["fsdp=2 context=2 tensor=2"])),  # key heads are filled up, not repeated
        *slow(("dual chunk", ["context=4 tensor=2"])),  # quick: the operation, test_ops.py
        *slow(("dual chunk", ["context=8", "fsdp=2 context=4"])),
        *slow(("yarn", ["replica=2 data=2 context=2"])),
        *slow(("sliding", ["replica=2 fsdp=2 context=2"]), ("sliding", ["context=4 tensor=2"])),
        *slow(("moe", ["fsdp=2 expert=2 context=2"])),  # quick: the layer, test_expert_parallel.py
        *slow(("moe", ["expert=8", "expert=4 tensor=2", "replica=2 data=2 expert=2"])),
        *slow(("moe mixed", ["fsdp=2 expert=2 tensor=2", "expert=2 context=2 tensor=2"])),
        *slow(("adapters", ["fsdp=2 tensor=4"])),
    ],
)
def test_a_mesh_changes_no_gradient(case, meshes, eight):
    eight("gradients_on_meshes", "equal", case, meshes)
