# SPDX-License-Identifier: Apache-2.0
"""Names of dimensions to mesh axes: the table, collisions and sizes that do not divide."""

import jax
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from qwen2_jax import PRESETS, model, params
from qwen2_jax.errors import UserError
from qwen2_jax.sharding import RULES, make_mesh, sharding, spec

MESH = AbstractMesh((2, 4), ("fsdp", "tensor"))


def test_names_become_mesh_axes():
    assert spec(("vocab", "embed"), MESH) == PartitionSpec("tensor", "fsdp")
    assert spec(("layers", "embed", "heads", "head_dim"), MESH) == PartitionSpec(None, "fsdp", "tensor", None)
    assert spec(("batch", None), MESH) == PartitionSpec("fsdp", None)  # the mesh has no "data"


def test_two_dimensions_on_one_axis_are_refused():
    with pytest.raises(ValueError, match="map to one mesh axis"):
        spec(("heads", "mlp"), MESH)


def test_sizes_that_do_not_divide_name_those_that_do():
    with pytest.raises(UserError, match=r"dimension kv_heads = 2 cannot be split over tensor=4.*1, 2"):
        sharding(("kv_heads", "head_dim"), (2, 64), MESH)


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
