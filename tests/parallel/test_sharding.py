# SPDX-License-Identifier: Apache-2.0
"""Names of dimensions to mesh axes: the table, collisions and sizes that do not divide."""

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from qwen2_jax import PRESETS, model
from qwen2_jax.errors import UserError
from qwen2_jax.parallel.sharding import RULES, SERVING, make_mesh, sharding, spec
from qwen2_jax.weights import params

MESH = AbstractMesh((2, 4), ("fsdp", "tensor"))
WIDE = AbstractMesh((2, 2, 2, 4), ("fsdp", "expert", "context", "tensor"))


def test_names_become_mesh_axes():
    assert spec(("vocab", "embed"), (8, 4), MESH) == PartitionSpec("tensor", "fsdp")
    names, shape = ("layers", "embed", "heads", "head_dim"), (3, 4, 8, 16)
    assert spec(names, shape, MESH) == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec(("batch", None), (4, 3), MESH) == PartitionSpec("fsdp", None)  # the mesh has no "data"


def test_an_axis_splits_the_first_dimension_that_names_it():
    assert spec(("heads", "mlp"), (8, 8), MESH) == PartitionSpec("tensor", None)
    assert spec(("vocab", "embed"), (8, 8), WIDE) == PartitionSpec("tensor", ("fsdp", "context", "expert"))
    names, shape = ("experts", "mlp", "embed"), (8, 8, 8)
    assert spec(names, shape, WIDE) == PartitionSpec("expert", "tensor", ("fsdp", "context"))
    assert spec(names, shape, WIDE, SERVING) == PartitionSpec("expert", "tensor", "fsdp")
    assert spec(("batch", "length"), (4, 4), WIDE) == PartitionSpec(("fsdp", "expert"), "context")


def test_heads_that_do_not_divide_leave_their_axis_to_the_width():
    assert spec(("heads", "head_dim", "embed"), (14, 64, 896), MESH) == PartitionSpec(None, "tensor", "fsdp")
    with pytest.raises(UserError, match=r"dimension heads = 14 cannot be split over tensor=4.*1, 2, 7, 14"):
        sharding(("heads", "head_dim"), (14, 6), MESH)


def test_sizes_that_do_not_divide_name_those_that_do():
    with pytest.raises(UserError, match=r"dimension vocab = 6 cannot be split over tensor=4.*1, 2, 3, 6"):
        sharding(("vocab", "embed"), (6, 64), MESH)
    with pytest.raises(UserError, match=r"dimension embed = 6 cannot be split over fsdp=2 x context=2.*1, 2, 3, 6"):
        sharding(("vocab", "embed"), (8, 6), WIDE)


def test_axes_have_known_names():
    with pytest.raises(UserError, match="no axis model; choose from replica, data, fsdp"):
        make_mesh(model=1)


def test_mesh_must_use_every_device():
    with pytest.raises(UserError, match="product must be"):
        make_mesh(tensor=len(jax.devices()) + 1)


@pytest.mark.parametrize("name", ["qwen2-72b", "qwen2-57b-a14b"])
def test_every_parameter_of_the_large_models_has_a_place(name):
    mesh = AbstractMesh((2, 4, 4), ("fsdp", "tensor", "expert"))
    _, specs = model.declare(PRESETS[name])
    for _, leaf in params.leaves(specs):
        assert set(leaf.axes) <= set(RULES)
        sharding(leaf.axes, leaf.shape, mesh)
