"""What the tests tell XLA is what the installed one knows: it ends a process over a flag that it does not."""

from tests.fakes import pod


def test_flags_that_xla_does_not_know_are_left_out() -> None:
    assert pod.flags(xla_no_such_flag="1", xla_dump_to="x") == "--xla_dump_to=x"
    assert not pod.knows("xla_dump_t")  # a part of a name is none
    assert "--xla_backend_optimization_level=0" in pod.QUICK_TO_COMPILE
