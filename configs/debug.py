"""A small model that learns Python source in minutes on a laptop.

tvq train --config=configs/debug.py --workdir=runs/debug
"""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    c = config.base()
    c.model.n_layer, c.model.d_model, c.model.d_k, c.model.d_v = 2, 128, 64, 256
    c.model.n_code, c.model.block_len, c.model.mem_len = 128, 128, 128
    c.optimizer.lr_max, c.optimizer.grad_clip = 3e-3, 1.0
    c.optimizer.n_warmup_step, c.optimizer.n_max_step = 50, 600
    c.train.steps, c.train.global_batch_size = 600, 8
    c.train.sequence_len, c.train.update_len = 1024, 512
    c.evaluate.every, c.checkpoint.every, c.log.every = 200, 100, 20
    return c
