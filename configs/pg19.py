"""PG-19, books in 32,000 pieces, as in the paper (1.3B parameters).

    tvq prepare pg19 --download --input=raw/pg19 --output=data/pg19
    tvq train --config=configs/pg19.py --workdir=runs/pg19
    tvq eval --workdir=runs/pg19 --split=test

Predicted, not measured: five days on eight H100, at 40 % of their bfloat16 peak (tvq/model/flops.py).
Published: a word-level perplexity of 26.6 on the test split.
"""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    c = config.base()
    c.data.source, c.data.path = "tokens", "data/pg19"
    c.model.n_vocab, c.model.d_model, c.model.d_v = 32_000, 2048, 4096
    c.model.attend_across_documents, c.model.dtype = True, "bfloat16"
    c.model.e_tie, c.model.e_preln, c.model.e_scale = True, True, 0.005
    c.model.p_dropsin = c.model.p_dropres = c.model.p_droplyr = 0.1
    c.optimizer.name, c.optimizer.lr_max = "adafactor", 0.01
    c.optimizer.grad_clip = c.optimizer.wd_lam = 0.0
    c.optimizer.n_max_step = c.train.steps = 500_000
    c.sample.nucleus = 0.8
    return c
