"""Costs read from compiled programs: loops, slices, products, messages."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from tvq.plan import program
from tvq.plan.program import Array, Program

F32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)


def read(function, *shapes) -> Program:
    return Program.read(jax.jit(function).lower(*shapes).compile().as_text())


def flops(found: Program) -> float:
    return sum(kernel.n * kernel.flops for kernel in found.kernels())


def test_loops_count_as_often_as_they_run():
    def stack(x, w):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        outer = lambda x, _: (lax.scan(inner, x, w)[0], None)
        return lax.scan(outer, x, None, length=3)[0]

    assert flops(read(stack, F32((8, 16)), F32((5, 16, 16)))) == 3 * 5 * 2 * 8 * 16 * 16
    assert flops(read(lambda x, w: x @ w, F32((8, 16)), F32((16, 4)))) == 2 * 8 * 16 * 4


def test_of_a_stack_a_loop_reads_one_layer():
    stack = lambda x, w: lax.scan(lambda x, w: (x * w, None), x, w)[0]
    moved = sum(
        kernel.n * kernel.nbytes for kernel in read(stack, F32((64, 64)), F32((100, 64, 64))).kernels()
    )
    layer = 4 * 64 * 64
    assert 3 * 100 * layer <= moved <= 5 * 100 * layer + 2 * layer


FLASH = """
ENTRY %main (q.1: bf16[2,16,3,8], k.1: bf16[2,16,3,8], v.1: bf16[2,16,3,8]) -> bf16[2,16,3,8] {
  %q.1 = bf16[2,16,3,8]{3,2,1,0} parameter(0)
  %k.1 = bf16[2,16,3,8]{3,2,1,0} parameter(1)
  %v.1 = bf16[2,16,3,8]{3,2,1,0} parameter(2)
  %flash.1 = (bf16[2,3,16,8]{3,1,2,0}, f32[2,3,16]{2,1,0}, u8[0]{0}) custom-call(%q.1, %k.1, %v.1), \
custom_call_target="__cudnn$fmhaSoftmaxNAME", backend_config={}
  %out.1 = bf16[2,3,16,8]{3,1,2,0} get-tuple-element(%flash.1), index=0
  ROOT %cast.1 = bf16[2,16,3,8]{3,2,1,0} bitcast(%out.1)
}
"""


@pytest.mark.parametrize(("name", "products"), [("", 2), ("Backward", 5)])
def test_flash_attention_computes_half_of_all_scores(name, products):
    assert flops(Program.read(FLASH.replace("NAME", name))) == products * 2 * 3 * 16 * 16 * 8


HLO = """
%fused (p.0: f32[9,8], p.1: f32[1,8], p.2: s32[]) -> f32[9,8] {
  %p.0 = f32[9,8]{1,0} parameter(0)
  %p.1 = f32[1,8]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %cast.1 = f32[9,8]{1,0} bitcast(%p.0)
  %zero.1 = s32[] constant(0)
  ROOT %put.1 = f32[9,8]{1,0} dynamic-update-slice(%cast.1, %p.1, %p.2, %zero.1)
}

ENTRY %main (a.1: f32[9,8], b.1: f32[1,8], c.1: s32[]) -> f32[9,8] {
  %a.1 = f32[9,8]{1,0} parameter(0)
  %b.1 = f32[1,8]{1,0:T(8,128)S(1)} parameter(1)
  %c.1 = s32[] parameter(2)
  ROOT %d.1 = f32[9,8]{1,0} fusion(%a.1, %b.1, /*index=2*/%c.1), kind=kLoop, calls=%fused, metadata={}
}
"""


def test_an_update_in_place_moves_what_it_updates():
    (kernel,) = Program.read(HLO).kernels()
    assert kernel.nbytes == 4 * 8 + 4 * 8 + 4  # in, out, index


def test_fast_memory_is_free():
    scope = Program.read(HLO).computations["main"]
    assert scope["b.1"].arrays == [Array("f32", (1, 8), fast=True)]
    assert scope["b.1"].nbytes == 0
    assert scope["a.1"].nbytes == 4 * 9 * 8


HOLES = "window={size=8 stride=7 lhs_dilate=8}, dim_labels=0bf_0io->0bf"
PADDING = "window={size=8 pad=7_7 rhs_reversal=1}, dim_labels=bf0_0oi->b0f"


@pytest.mark.parametrize(
    ("left", "right", "out", "rest", "products"),
    [
        ("8,16", "16,4", "8,4", "dim_labels=bf_io->bf", 8 * 16 * 4),
        # Eight products, as a window that slides over holes or over padding.
        ("8,512,16", "8,16,4", "8,512,4", HOLES, 8 * 512 * 16 * 4),
        ("512,16,1", "8,64,16", "512,8,64", PADDING, 8 * 512 * 64 * 16),
    ],
)
def test_products_of_a_tpu(left, right, out, rest, products):
    text = f"""
ENTRY %main (a.1: f32[{left}], b.1: f32[{right}]) -> f32[{out}] {{
  %a.1 = f32[{left}] parameter(0)
  %b.1 = f32[{right}] parameter(1)
  ROOT %c.1 = f32[{out}] convolution(%a.1, %b.1), {rest}, operand_precision={{highest,highest}}
}}
"""
    (kernel,) = Program.read(text).kernels()
    assert (kernel.flops, kernel.precision) == (2 * products, "highest")


def test_messages_go_along_axes():
    """On a 2 x 4 mesh of 8 devices."""
    devices = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec(("a", "b"))

    def exchange(x):
        x = lax.psum(x, "a") + lax.psum(x, ("a", "b"))
        y = lax.all_gather(x, "b", tiled=True)
        y = lax.psum_scatter(y, "b", tiled=True)
        return x + y + lax.ppermute(x, "b", [(i, (i + 1) % 4) for i in range(4)])

    sharded = jax.shard_map(exchange, mesh=devices, in_specs=spec, out_specs=spec, check_vma=False)
    found = read(sharded, F32((8, 1024)))
    part = 4 * 1024
    kinds = {(one.kind, one.groups[0]): one.sent for one in found.collectives(8)}
    assert kinds == {
        ("all-reduce", (0, 4)): part,
        ("all-reduce", (0, 1, 2, 3, 4, 5, 6, 7)): 2 * part * 7 / 8,
        ("all-gather", (0, 1, 2, 3)): 3 * part,
        ("reduce-scatter", (0, 1, 2, 3)): 4 * part * 3 / 4,
        ("collective-permute", (0, 1)): part,
    }


def test_a_message_under_way_counts_once():
    part = """
%fused.{i} (p.{i}: f32[8]) -> f32[16] {{
  %p.{i} = f32[8] parameter(0)
  ROOT %g.{i} = f32[16] all-gather(%p.{i}), {options}
}}
"""
    main = """
ENTRY %main (a.1: f32[8]) -> f32[16] {
  %a.1 = f32[8] parameter(0)
  %b.1 = f32[16] fusion(%a.1), kind=kCustom, calls=%fused.1
  ROOT %c.1 = f32[16] fusion(%a.1), kind=kCustom, calls=%fused.2
}
"""
    chain = 'channel_id=7, replica_groups={{0,1}}, frontend_attributes={chain_id="6"}'
    for options, n in ((chain, 1), ("channel_id=7, replica_groups={{0,1}}", 2)):
        fused = [part.format(i=i, options=options) for i in (1, 2)]
        found = list(Program.read("".join(fused) + main).collectives(2))
        assert [one.sent for one in found] == n * [4 * 8]


@pytest.mark.parametrize(
    ("kept", "kind", "sent"),
    [("dynamic-slice(%r.1, %i.1)", "reduce-scatter", 32 / 2), ("add(%r.1, %p.1)", "all-reduce", 32)],
)
def test_a_sum_of_which_a_slice_is_kept_is_scattered(kept, kind, sent):
    text = f"""
%all-reduce-scatter (p.1: f32[8], i.1: u32[]) -> f32[4] {{
  %p.1 = f32[8]{{0}} parameter(0)
  %i.1 = u32[] parameter(1)
  %r.1 = f32[8]{{0}} all-reduce(%p.1), channel_id=2, replica_groups={{{{0,1}}}}, to_apply=%add
  ROOT %s.1 = f32[4]{{0}} {kept}, dynamic_slice_sizes={{4}}
}}

ENTRY %main (a.1: f32[8], b.1: u32[]) -> f32[4] {{
  %a.1 = f32[8]{{0}} parameter(0)
  %b.1 = u32[] parameter(1)
  ROOT %c.1 = f32[4]{{0}} fusion(%a.1, %b.1), kind=kCustom, calls=%all-reduce-scatter
}}
"""
    (found,) = Program.read(text).collectives(2)
    assert (found.kind, found.sent) == (kind, sent)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[4]", [(0, 1), (2, 3)]),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", [(0, 2), (1, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
    ],
)
def test_groups(text, groups):
    one = program.Instruction("x", "all-reduce", [], [], "", text, root=False)
    assert program.groups_of(one, 4) == groups
