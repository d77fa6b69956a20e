"""Costs read from compiled programs: loops, slices, products, messages."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec

from tvq.errors import InputError
from tvq.programs.plan import hlo, program
from tvq.programs.plan.hlo import Array
from tvq.programs.plan.program import Program

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
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, use_global_device_ids=true", [(0, 1), (2, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [(0, 2), (1, 3)]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}", [(0, 1, 2, 3)]),
        ("replica_groups={}", [(0, 1, 2, 3)]),
    ],
)
def test_groups(text, groups):
    one = hlo.Instruction("x", "all-reduce", [], [], "", text, root=False)
    assert program.groups_of(one, 4) == groups


@pytest.mark.parametrize(
    "form",
    [
        "replica_groups=mesh['a'=2,'b'=2], device_ids=([4]T(1,0)) {'b'}",
        "replica_groups=mesh['a'=4] {'a':(1)2}",
        "replica_groups=[2,2]<=[4]+1",
        "replica_groups=all",
    ],
)
def test_groups_in_a_form_that_is_not_known_are_refused(form):
    one = hlo.Instruction("x", "all-reduce", [], [], "", form, root=False)
    with pytest.raises(InputError, match=r"replica_groups=.*, whose cost is not known here"):
        program.groups_of(one, 4)


ANYTHING = """
ENTRY %main (a.1: f32[8]) -> f32[8] {{
  %a.1 = f32[8]{{0}} parameter(0)
  {line}
  ROOT %c.1 = f32[8]{{0}} negate(%a.1)
}}
"""


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("%b.1 = f32[8]{0} ragged-dot(%a.1, %a.1), lhs_contracting_dims={0}", "`ragged-dot`"),
        ("%b.1 = ((f32[8]{0}), f32[8]{0}) dot-start(%a.1), calls=%f", "`dot-start`"),
        ("%b.1 = f32[8]{0} an-operation-to-come(%a.1)", "`an-operation-to-come`"),
        ("%b.1 = f8e4m3fn[8]{0} convert(%a.1)", "`f8e4m3fn[8]`"),
        ("%b.1 = (f32[8]{0}, s4[8]{0}) custom-call(%a.1)", "`s4[8]`"),
        ("%b.1 = f32[<=8]{0} negate(%a.1)", "`f32[<=8]`"),
        ("b.1 := negate a.1", "a line that is not an instruction"),
    ],
)
def test_a_form_that_is_not_known_is_refused(line, named):
    with pytest.raises(InputError, match=re.escape(f"writes {named}, whose cost is not known here")) as error:
        Program.read(ANYTHING.format(line=line))
    assert f"The line is: {line}" in str(error.value)


@pytest.mark.parametrize("target", ["__onednn$matmul", "xla.gpu.triton", "AllocateBuffers", ""])
def test_a_call_of_what_is_not_known_is_refused(target):
    call = f'%b.1 = f32[8]{{0}} custom-call(%a.1), custom_call_target="{target}"'
    with pytest.raises(InputError, match=re.escape(f"writes a `custom-call` of `{target}`, whose cost")):
        list(Program.read(ANYTHING.format(line=call)).kernels())


def test_which_branch_runs_and_how_often_a_loop_must_be_known():
    known = Program.read(ANYTHING.format(line=""))
    branch = hlo.Instruction("b.1", "conditional", [], [], "", "", root=False)
    known.computations["main"]["b.1"] = branch
    with pytest.raises(InputError, match="`conditional`"):
        list(known.kernels())
    endless = branch._replace(op="while", attributes="condition=%main, body=%main")
    known.computations["main"]["b.1"] = endless
    with pytest.raises(InputError, match="`while` that ends at no number"):
        list(known.kernels())


BESIDE = """
%slice (p.0: f32[48,64], p.1: s32[]) -> f32[1,64] {
  %p.0 = f32[48,64]{1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %z.1 = s32[] constant(0)
  ROOT %s.1 = f32[1,64]{1,0} dynamic-slice(%p.0, %p.1, %z.1), dynamic_slice_sizes={1,64}
}

%update (p.0: f32[48,64], p.1: f32[1,64], p.2: s32[]) -> f32[48,64] {
  %p.0 = f32[48,64]{1,0} parameter(0)
  %p.1 = f32[1,64]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %z.2 = s32[] constant(0)
  ROOT %u.1 = f32[48,64]{1,0} dynamic-update-slice(%p.0, %p.1, %p.2, %z.2)
}

ENTRY %main (a.1: f32[48,64], i.1: s32[]) -> f32[48,64] {
  %a.1 = f32[48,64]{1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  %get.1 = ((f32[48,64], s32[]), f32[1,64], u32[]) fusion-start(%a.1, %i.1), kind=kLoop, calls=%slice
  %got.1 = f32[1,64]{1,0} fusion-done(%get.1)
  %put.1 = ((f32[48,64], f32[1,64], s32[]), f32[48,64], u32[]) fusion-start(%a.1, %got.1, %i.1), calls=%update
  ROOT %set.1 = f32[48,64]{1,0} fusion-done(%put.1), control-predecessors={%got.1}
}
"""


def test_a_fusion_beside_other_work_moves_what_it_slices():
    """Like one that is waited for at once; with its operands it would be 48 times as much."""
    kernels = list(Program.read(BESIDE).kernels())
    assert [kernel.instruction.name for kernel in kernels] == ["get.1", "put.1"]
    assert [kernel.nbytes for kernel in kernels] == [2 * 4 * 64 + 4] * 2


def test_totals_of_a_gradient_are_what_the_mathematics_needs():
    """With the compiler that runs: the products of a stack of layers, and each layer's weights thrice."""
    n, width, batch = 48, 64, 4

    def loss(w, x):
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum()

    kernels = list(read(jax.grad(loss, (0, 1)), F32((n, width, width)), F32((batch, width))).kernels())
    assert sum(kernel.n * kernel.flops for kernel in kernels) == 3 * n * 2 * batch * width**2
    layer, kept = 4 * width**2, 4 * batch * width
    # Read forward and backward, and the gradient written. A CPU's compiler also copies what it slices and
    # turns it; the whole stack, counted once a layer, would be 16 times the least or more.
    least = n * (3 * layer + 4 * kept)
    moved = sum(kernel.n * kernel.nbytes for kernel in kernels)
    assert least <= moved <= 4 * least
