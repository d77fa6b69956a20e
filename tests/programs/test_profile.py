"""Costs read from a trace; the names in it are those of the parts of a step."""

import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tvq.programs import profile
from tvq.programs.plan.program import Program as Text
from tvq.run import trace

PROGRAM = """
%fused (p0: f32[10,10]) -> f32[10,10] {
  %p0 = f32[10,10]{1,0} parameter(0)
  ROOT %exp.1 = f32[10,10]{1,0} exponential(%p0), metadata={op_name="jit(a)/transpose(jvp(attention))/exp"}
}

ENTRY %main (a: f32[10,10]) -> f32[10,10] {
  %a = f32[10,10]{1,0} parameter(0)
  %dot.1 = f32[10,10]{1,0} dot(%a, %a), metadata={op_name="jit(train_step)/jvp(loss)/dot_general"}
  %dot.2 = f32[10,10]{1,0} dot(%dot.1, %a)
  %fusion.1 = f32[10,10]{1,0} fusion(%dot.2), kind=kLoop, calls=%fused
  ROOT %copy.1 = f32[10,10]{1,0} copy(%a)
}
"""


def test_costs_of_a_program() -> None:
    seconds = {"dot.1": 0.5, "dot.2": 0.25, "fusion.1": 1.0, "copy.1": 0.25}
    assert profile.costs(Text.read(PROGRAM), seconds) == [
        ("attention", "backward", "exp", 1.0, 800, 1),
        ("loss", "forward", "dot_general", 0.75, 2400, 2),  # one without a name is named after what it reads
        ("other", "forward", "copy", 0.25, 800, 1),
    ]
    lines = profile.table(profile.costs(Text.read(PROGRAM), seconds), {}).splitlines()
    assert lines[1].split() == ["50.0", "%", "1000.00", "0.0", "0.0", "1", "attention,", "backward:", "exp"]
    assert lines[5] == "by part, of 2,000.0 ms a step and device:"
    assert lines[6] == " 50.0 %  attention"


def xspace(*events: str, plane: str = "/device:GPU:0") -> bytes:
    """A trace of a device whose events last a millisecond each, in its text form."""
    made = "".join(f"events {{ metadata_id: 1 duration_ps: 1000000000 {event} }}" for event in events)
    name = lambda kind, key, name: f'{kind} {{ key: {key} value {{ id: {key} name: "{name}" }} }}'
    names = (
        name("event_metadata", 1, "nvjet")
        + name("stat_metadata", 1, "hlo_op")
        + name("stat_metadata", 2, "hlo_module")
    )
    text = f'planes {{ name: "{plane}" lines {{ name: "Stream #14" {made} }} {names} }}'
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)


def stats(op: str, module: str) -> str:
    return f'stats {{ metadata_id: 1 str_value: "{op}" }} stats {{ metadata_id: 2 str_value: "{module}" }}'


STEP = "jit_train_step"


def seconds_of(folder: Path, *events: str, **options: str) -> dict[str, float]:
    (folder / "a.xplane.pb").write_bytes(xspace(*events, **options))
    return profile.kernel_seconds(folder / "a.xplane.pb")


def test_a_trace_is_read_though_python_warns_of_its_types(tmp_path: Path) -> None:
    """In a process where warnings are errors, jaxlib of newer versions would end it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = seconds_of(tmp_path, stats("dot.1", STEP), stats("dot.1", STEP), stats("dot.1", "jit_init"))
    assert found == {"dot.1": pytest.approx(2e-3)}


def test_what_a_gpu_does_outside_of_programs_is_time_too(tmp_path: Path) -> None:
    assert seconds_of(tmp_path, "") == {"nvjet": pytest.approx(1e-3)}
    assert not seconds_of(tmp_path, "", plane="/host:CPU")


def test_kernels_of_cuda_graphs_are_not_attributed(tmp_path: Path) -> None:
    found = seconds_of(tmp_path, stats("command_buffer_1", STEP), stats("command_buffer_2", STEP))
    program = Text.read(PROGRAM)
    assert not profile.costs(program, found)
    rest = profile.unattributed(program, found)
    assert sum(rest.values()) == pytest.approx(2e-3)
    assert "`command_buffer`" in profile.nameless("NVIDIA H200", rest)
    assert "does not name its kernels" in profile.nameless("NVIDIA H200", {"nvjet": 1.0})


CALLED = """
%command_buffer.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %exp.2 = f32[8]{0} exponential(%p.1)
}

%other (p.2: f32[8]) -> f32[8] {
  %p.2 = f32[8]{0} parameter(0)
  ROOT %exp.3 = f32[8]{0} exponential(%p.2)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %call.1 = f32[8]{0} call(%a), to_apply=%command_buffer.1
  ROOT %call.2 = f32[8]{0} call(%call.1), to_apply=%other
}
"""


def test_a_part_of_the_time_is_not_told_as_all_of_it() -> None:
    seconds = {"exp.3": 1.0, "call.2": 1.5, "call.1": 2.0, "nvjet": 1.0}
    program = Text.read(CALLED)
    rest = profile.unattributed(program, seconds)
    assert rest == {"call.1": 2.0, "nvjet": 1.0}  # what an ordinary call holds stands under its own name
    text = profile.table(profile.costs(program, seconds), rest)
    assert " 75.0 %  not attributed: call.1, nvjet" in text
    assert "by part, of 4,000.0 ms a step" in text
    assert text.endswith("only 25.0 % of this time is in kernels that both the trace and the program name")
    little = profile.table(profile.costs(program, seconds), {"nvjet": 0.1})
    assert "not attributed: nvjet" in little
    assert "only" not in little


def test_the_options_that_keep_kernels_out_of_cuda_graphs_are_known() -> None:
    """By every compiler, by name; a wrong one is refused."""
    lowered = jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4)))
    lowered.compile(profile.WITHOUT_COMMAND_BUFFERS)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such"):
        lowered.compile({"xla_gpu_no_such_option": ""})


@pytest.mark.parametrize("every", [2, 3])
def test_a_traced_step_traces_its_updates_and_no_others(tmp_path: Path, every: int) -> None:
    def train_step(x: jax.Array) -> jax.Array:
        with jax.named_scope("loss"):
            return jnp.tanh(x @ x)

    said: list[str] = []
    step = trace.Traced(jax.jit(train_step), 10, every, range(12, 15), tmp_path, said.append)
    x = jnp.ones((8, 8))
    written = []
    for _ in range(4):
        x = step(x)
        written.append(len(list(tmp_path.glob("plugins/profile/*/*.xplane.pb"))))
    # From the call that makes update 12 to the one that makes 14.
    assert written == ([0, 0, 1, 1] if every == 2 else [0, 1, 1, 1])
    assert said == [f"trace of updates {12 if every == 2 else 10} to 16: tensorboard --logdir {tmp_path}"]
    assert sum(profile.kernel_seconds(profile.newest(tmp_path)).values()) > 0
    assert "update" in {event.name for event in profile.events(profile.newest(tmp_path))}
