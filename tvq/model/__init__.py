"""The front of the model: the only part of this folder that the rest of the program imports.

    weights     Weights, init, named, specs, gather, learn, measure, TRAINING_ONLY
    reading     State, start, state_dims, state_specs, forward, stats_specs, log_probs, logits, auxiliary_loss
    writing     Decoding, begin, step
    randomness  Draws, draw_probe
    health      use, remember, snapshot
    costs       train_flops, unit_flops, kept_bytes, exchanged_bytes
    elsewhere   for_platform, describe; original, the files of the original program; core, attention alone

Another model is another folder with these names; `docs/extending.md` says what each must do.
"""

from tvq.model import core, original
from tvq.model.flops import exchanged_bytes, kept_bytes, train_flops, unit_flops
from tvq.model.layers import Draws, draw_probe
from tvq.model.parameters import TRAINING_ONLY, Declared, Weights, init, named, specs
from tvq.model.parameters import gather_tables as gather
from tvq.model.snapshot import IN_ROWS, OVERUSED, remember, snapshot, use
from tvq.model.transformer import (
    Decoding,
    State,
    auxiliary_loss,
    begin,
    describe,
    for_platform,
    forward,
    learn,
    log_probs,
    logits,
    measure,
    start,
    state_dims,
    state_specs,
    stats_specs,
    step,
)

__all__ = [
    "IN_ROWS", "OVERUSED", "TRAINING_ONLY", "Declared", "Decoding", "Draws", "State", "Weights",
    "auxiliary_loss", "begin", "core", "describe", "draw_probe", "exchanged_bytes", "for_platform",
    "forward", "gather", "init", "kept_bytes", "learn", "log_probs", "logits", "measure", "named",
    "original", "remember", "snapshot", "specs", "start", "state_dims", "state_specs", "stats_specs", "step",
    "train_flops", "unit_flops", "use",
]  # fmt: skip
