"""Costs read from a trace; the names in it are those of the parts of a step."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tvq import profile, trace
from tvq.plan.program import Program as Text

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
    lines = profile.table(profile.costs(Text.read(PROGRAM), seconds)).splitlines()
    assert lines[1].split() == ["50.0", "%", "1000.00", "0.0", "0.0", "1", "attention,", "backward:", "exp"]
    assert lines[5] == "by part, of 2,000.0 ms a step and device:"
    assert lines[6] == " 50.0 %  attention"


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
    planes = jax.profiler.ProfileData.from_file(str(profile.newest(tmp_path))).planes
    assert "update" in {event.name for plane in planes for line in plane.lines for event in line.events}
