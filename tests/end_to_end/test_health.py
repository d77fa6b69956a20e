"""What a run says about itself: where its time goes, and whether it is well."""

import shutil
from pathlib import Path

import pytest

from tests.end_to_end.conftest import Here
from tests.end_to_end.program import Program
from tvq.programs import doctor, profile
from tvq.run import health, records, trace


@pytest.mark.slow
def test_profile(tvq: Program, tmp_path: Path) -> None:
    options = [option for option in tvq.options(tmp_path) if not option.startswith("--workdir")]
    stdout, _ = tvq.run("profile", *options, f"--output={tmp_path}")
    lines = stdout.splitlines()
    assert lines[1].split() == ["share", "ms", "MB", "GB/s", "launches", "what"]
    shares = {
        line.split()[2]: float(line.split()[0]) for line in lines if line.count(" %  ") and "," not in line
    }
    assert set(shares) == {*trace.PARTS, profile.EXCHANGE, profile.OTHER}
    assert sum(shares.values()) == pytest.approx(100, abs=1)
    # Not its share: on a busy machine a kernel that waited for its processor seems large.
    assert sum(" other, " in line for line in lines[2:12]) < 7


@pytest.mark.slow
def test_a_run_writes_the_trace_that_was_asked_for(unbroken: Path) -> None:
    seconds = profile.kernel_seconds(profile.newest(unbroken / "profile"))
    assert sum(seconds.values()) > 0


@pytest.mark.slow
def test_doctor_reads_a_run_and_a_checkpoint_alone(here: Here, tvq: Program, run: Path) -> None:
    assert "\n1. " not in here("doctor", f"--workdir={run}")[0]
    with (run / records.FILE).open("a") as file:
        file.write('{"step": 21, "split": "train", "loss": null, "grad_norm": 1.0}\n')
    out, _ = here("doctor", f"--workdir={run}", exit_code=doctor.FOUND)
    assert out.startswith(f"{run}: rows to step 21, codebooks of step 20\n1. the loss or its gradient is not")
    shutil.rmtree(run / health.FOLDER)
    (run / records.FILE).unlink()
    out, _ = tvq.run("doctor", f"--workdir={run}", "--config.train.reproducible=true")
    assert out == (
        f"{run}: rows to step none, codebooks of step 18\nnothing is wrong that can be seen from here\n"
    )
