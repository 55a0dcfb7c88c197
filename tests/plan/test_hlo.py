# SPDX-License-Identifier: Apache-2.0
"""Collectives read from XLA's text: from small hand-written modules, and from programs compiled for 8 devices."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ahead_of_time import TPU_COMPILER
from qwen2_jax.plan import machine
from qwen2_jax.plan.hlo import collectives

LOOPS = """
HloModule loops

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%below.5 (state: (s32[], f32[4,8])) -> pred[] {
  %state = (s32[], f32[4,8]) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %five = s32[]{:T(128)} constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%inner (state.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state.1 = (s32[], f32[4,8]) parameter(0)
  %value = f32[4,8]{1,0:T(8,128)} get-tuple-element(%state.1), index=1
  %gathered = f32[16,8]{1,0} all-gather(%value), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %out = (s32[], f32[4,8]) tuple(%i, %value)
}

%outer (state.2: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %state.2 = (s32[], f32[4,8]) parameter(0)
  %summed = f32[4,8]{1,0} all-reduce(%value.2), channel_id=2, replica_groups={{0,4},{1,5},{2,6},{3,7}}, to_apply=%add
  ROOT %loop = (s32[], f32[4,8]) while(%state.2), condition=%below.5, body=%inner
}

%known (state.3: (s32[], f32[4,8])) -> pred[] {
  ROOT %true = pred[] constant(true)
}

%yes (p: f32[4,8]) -> f32[4,8] {
  %swapped = f32[4,8]{1,0} all-to-all(%p), channel_id=3, replica_groups={}, dimensions={0}
}

%no (p.1: f32[4,8]) -> f32[4,8] {
  %p.1 = f32[4,8] parameter(0)
}

ENTRY %main (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8] parameter(0)
  %twice = (s32[], f32[4,8]) while(%init), condition=%known, body=%outer, backend_config={"known_trip_count":{"n":"2"}}
  %chosen = f32[4,8] conditional(%good, %a, %a), true_computation=%yes, false_computation=%no
  %start = ((f32[4,8], bf16[2]), (f32[1,8], bf16[1])) reduce-scatter-start(%a, %b), channel_id=4, replica_groups=[2,4]<=[8], to_apply=%add
  %done = (f32[1,8], bf16[1]) reduce-scatter-done(%start)
  %moved = f32[4,8]{1,0} collective-permute(%a), channel_id=5, source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  ROOT %all = f32[4,8] add(%a, %a)
}
"""  # noqa: E501

MESH = {"fsdp": 2, "tensor": 4}


def by_kind(text, devices=8):
    found = {}
    for collective in collectives(text, range(devices)):
        found.setdefault(collective.kind, []).append(collective)
    return found


def test_loops_and_branches_multiply():
    found = by_kind(LOOPS)
    (gather,) = found["all-gather"]
    assert (gather.times, gather.bytes, gather.group_size) == (2 * 5, 16 * 8 * 4, 4)
    assert gather.axes(MESH) == ("tensor",)
    (reduce,) = found["all-reduce"]
    assert (reduce.times, reduce.bytes, reduce.axes(MESH)) == (2, 4 * 8 * 4, ("fsdp",))
    assert reduce.received == 2 * (2 * 1 / 2 * 128)
    (exchange,) = found["all-to-all"]
    assert (exchange.times, exchange.group_size, exchange.axes(MESH)) == (1, 8, ("fsdp", "tensor"))
    (scatter,) = found["reduce-scatter"]
    assert scatter.bytes == 4 * (8 * 4 + 2)  # what goes in: four times what comes out
    (permute,) = found["collective-permute"]
    assert permute.axes(MESH) == ("tensor",) and permute.bytes == permute.received == 128


CHAIN = """
HloModule chain

%step.1 (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %g.1 = bf16[16,8] all-gather(%p), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%step.2 (p.1: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %g.2 = bf16[16,8] all-gather(%p.1), channel_id=7, replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}
}

%all-reduce-scatter.9 (input: f32[16,8]) -> f32[4,8] {
  %r = f32[16,8] all-reduce(%input), channel_id=8, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %mine = f32[4,8] dynamic-slice(%r, %at), dynamic_slice_sizes={4,8}
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %f.1 = (bf16[4,8], bf16[16,8]) fusion(%a), kind=kCustom, calls=%step.1
  %f.2 = (bf16[4,8], bf16[16,8]) fusion(%a, %f.1), kind=kOutput, calls=%step.2
  ROOT %f.3 = f32[4,8] fusion(%b), kind=kCustom, calls=%all-reduce-scatter.9
}
"""


def test_what_the_tpu_compiler_hides_counts_once():
    found = by_kind(CHAIN, devices=4)
    assert [c.times for c in found["all-gather"]] == [1]
    (scatter,) = found["reduce-scatter"]
    assert scatter.bytes == 16 * 8 * 4
    assert "all-reduce" not in found


RAGGED = """
HloModule ragged

ENTRY %main (a: bf16[512,256], b: bf16[768,256], c: s32[8]) -> bf16[512,256] {
  %a = bf16[512,256]{1,0} parameter(0)
  %wide = bf16[768,2,128]{2,1,0:T(2,128)(2,1)} broadcast(%zero), dimensions={}
  %rows = bf16[512,2,128]{2,1,0:T(2,128)(2,1)} reshape(%a)
  %go = ((bf16[512,2,128]{2,1,0}, bf16[768,2,128]{2,1,0}, s32[8]{0}, s32[8]{0}, s32[8]{0}, /*index=5*/s32[8]{0}), bf16[768,2,128]{2,1,0}, u32[]{:S(2)}, u32[]{:S(2)}) ragged-all-to-all-start(%rows, %wide, %c, %c, %c, /*index=5*/%c), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %came = bf16[768,2,128]{2,1,0} ragged-all-to-all-done(%go)
  %flat = bf16[768,256]{1,0} reshape(%came)
  ROOT %home = bf16[512,256]{1,0} ragged-all-to-all(%flat, %a, %c, %c, %c, /*index=5*/%c), channel_id=2, replica_groups=[2,4]<=[8]
}
"""  # noqa: E501


def test_a_ragged_exchange_counts_the_smaller_of_its_arrays():
    """There it goes into a window with room to spare, and home into an array without."""
    there, home = by_kind(RAGGED)["ragged-all-to-all"]
    assert there.bytes == home.bytes == 512 * 256 * 2
    assert there.axes(MESH) == home.axes(MESH) == ("tensor",)
    assert there.received == 3 / 4 * there.bytes


SLICES = """
HloModule two_slices, num_partitions=2

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %here = bf16[4,8] all-reduce(%a), channel_id=1, replica_groups={}, use_global_device_ids=true, to_apply=%add
  %send = (bf16[4,8]{1,0}, u32[], token[]) send(%here, %t), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (bf16[4,8]{1,0}, u32[], token[]) recv(%t), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_host_transfer_rendezvous="all-reduce_0",_xla_megascale_reduce_operation="SUM",_xla_megascale_target="{1,2}x{0:1}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send-done = token[] send-done(%send), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"}
  %send.1 = (f32[3]{0}, u32[], token[]) send(%b, %t), channel_id=5, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target={{100000,200001},{100001,200000}},_xla_megascale_transfer_type="ALL_GATHER"}
  %recv.1 = (f32[6]{0}, u32[], token[]) recv(%t), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target={{100000,200001},{100001,200000}},_xla_megascale_transfer_type="ALL_GATHER"}
  %send.2 = (f32[3]{0}, u32[], token[]) send(%b, %t), channel_id=7, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target={{100001->200001},{200001->100001}},_xla_megascale_transfer_type="ONE_TO_ONE"}
  ROOT %all = bf16[4,8] add(%a, %a)
}
"""  # noqa: E501


def test_messages_between_slices_are_what_is_handed_to_the_host():
    """Slices of two chips, whose ids are not in the mesh's order in the second."""
    mesh = {"replica": 2, "fsdp": 2}
    inside, between, gather, permute = collectives(SLICES, (100000, 100001, 200001, 200000))
    assert (inside.kind, inside.groups, inside.axes(mesh)) == ("all-reduce", ((0, 1),), ("fsdp",))
    assert (between.kind, between.bytes, between.groups) == ("all-reduce", 64, ((0, 2), (1, 3)))
    assert between.axes(mesh) == ("replica",)
    assert (gather.kind, gather.bytes, gather.received) == ("all-gather", 24, 12)
    assert gather.groups == ((0, 2), (1, 3))
    assert (permute.kind, permute.pairs) == ("collective-permute", ((1, 2), (2, 1)))
    assert permute.bytes == permute.received == 12


@pytest.mark.parametrize("_", [pytest.param(0, marks=TPU_COMPILER)])
def test_a_compiled_program_of_two_slices(_):
    """A sum over all chips of two slices of four: in the slice, then each chip's quarter between the slices."""
    where = machine.parse("2xv5p-8")
    mesh = machine.mesh_of(where, {"replica": 2, "fsdp": 4})
    whole = jax.shard_map(lambda x: jax.lax.psum(x, ("replica", "fsdp")), mesh=mesh, in_specs=P(), out_specs=P())
    given = jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=NamedSharding(mesh, P()))
    text = jax.jit(whole).lower(given).compile().as_text()
    found = collectives(text, [device.id for device in mesh.devices.flat])
    (between,) = (c for c in found if c.axes(mesh.shape) == ("replica",))
    assert (between.kind, between.bytes, between.group_size) == ("all-reduce", 256 * 1024 * 4 // 4, 2)
    assert {c.axes(mesh.shape) for c in found if c is not between} == {("fsdp",)}


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("[2,2]<=[4]", ((0, 1), (2, 3))),
        ("[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'b'}", ((0, 1), (2, 3))),
        ("mesh['a'=2,'b'=2] {'a'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
        ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
        ("{}", ((0, 1, 2, 3),)),
    ],
)
def test_all_ways_of_writing_groups(written, groups):
    line = f"  %g = f32[4] all-reduce(%a), channel_id=1, replica_groups={written}, use_global_device_ids=true"
    (found,) = collectives("ENTRY %main (a: f32[4]) -> f32[4] {\n" + line + "\n}\n", range(4))
    assert {tuple(sorted(group)) for group in found.groups} == set(groups)


SCRIPT = """
import json, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from qwen2_jax.plan.hlo import collectives
mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

def body(w, x):
    def layer(x, w):
        w = jax.lax.all_gather(w, "fsdp", axis=0, tiled=True)
        return jax.lax.psum(x @ w, "tensor"), None
    x, _ = jax.lax.scan(layer, x, w)
    x = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=0, tiled=True)
    x = jax.lax.all_to_all(x, "tensor", 1, 0, tiled=True)
    return jax.lax.ppermute(x, "tensor", [(i, (i + 1) % 4) for i in range(4)])

specs = {"in_specs": (P(None, "fsdp", None), P()), "out_specs": P(("fsdp", "tensor"))}
run = jax.shard_map(body, mesh=mesh, check_vma=False, **specs)
compiled = jax.jit(run).lower(jnp.zeros((6, 16, 16), jnp.float32), jnp.zeros((8, 16), jnp.float32)).compile()
found = [[c.kind, c.bytes, c.times, c.axes(dict(mesh.shape))] for c in collectives(compiled.as_text(), range(8))]
print(json.dumps(sorted(found)))
"""


def test_a_compiled_program_of_eight_devices():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    kinds = {kind: (size, times, axes) for kind, size, times, axes in json.loads(done.stdout)}
    assert kinds["all-gather"] == (16 * 16 * 4, 6, ["fsdp"])
    assert kinds["all-reduce"] == (8 * 16 * 4, 6, ["tensor"])
    # XLA:CPU may write a reduce-scatter as an all-reduce and a slice; this one stays.
    assert kinds["reduce-scatter"] == (8 * 16 * 4, 1, ["fsdp"])
    assert kinds["all-to-all"] == (4 * 16 * 4, 1, ["tensor"])
    assert kinds["collective-permute"] == (16 * 4 * 4, 1, ["tensor"])
