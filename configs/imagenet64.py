"""ImageNet64, byte by byte in raster order, as in the paper (1.2B parameters).

    tvq prepare imagenet64 --input=raw/imagenet64 --output=data/imagenet64
    tvq train --config=configs/imagenet64.py --workdir=runs/imagenet64
    tvq eval --workdir=runs/imagenet64 --split=test

The raw folder holds train_data_batch_1.npz to _10 and val_data.npz, of image-net.org (downsampled, 64x64).
Predicted, not measured: three and a half days on eight H100, at 40 % of their peak (tvq/model/flops.py).
Published: 3.16 bits a byte on the test split (the official validation images).
"""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    c = config.base()
    c.data.source, c.data.path = "tokens", "data/imagenet64"
    c.model.d_model, c.model.d_v = 2048, 4096
    c.model.attend_across_documents, c.model.dtype = True, "bfloat16"
    c.model.pe_abs, c.model.e_tie, c.model.e_preln, c.model.e_scale = True, True, True, 0.005
    c.model.p_dropsin = 0.1
    c.optimizer.name, c.optimizer.lr_max = "adafactor", 0.01
    c.optimizer.grad_clip = c.optimizer.wd_lam = 0.0
    c.optimizer.n_max_step = c.train.steps = 500_000
    c.train.sequence_len, c.train.update_len = 12_288, 1536  # an image is a sequence
    c.sample.every, c.sample.length, c.sample.nucleus = 10_000, 12_288, 0.999
    return c
