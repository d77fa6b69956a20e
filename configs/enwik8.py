"""enwik8, byte by byte, as in the paper (187M parameters).

    tvq prepare enwik8 --download --input=raw/enwik8.zip --output=data/enwik8
    tvq train --config=configs/enwik8.py --workdir=runs/enwik8
    tvq eval --workdir=runs/enwik8 --split=test

Predicted, not measured: six hours on eight H100, at 40 % of their bfloat16 peak (tvq/model/flops.py).
Published: 0.99 bits a byte on the test split.
"""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    c = config.base()
    c.data.source, c.data.path = "tokens", "data/enwik8"
    c.model.attend_across_documents, c.model.dtype = True, "bfloat16"
    c.model.p_dropsin, c.model.p_dropres, c.model.p_droplyr = 0.2, 0.5, 0.3
    return c
