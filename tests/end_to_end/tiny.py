"""The smallest run that has everything: cache, dropout, revived codes, evaluations, checkpoints."""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    c = config.base()
    c.data.source = "text"
    c.model.n_layer, c.model.d_model, c.model.d_k, c.model.d_v = 1, 16, 8, 16
    c.model.n_code, c.model.block_len, c.model.mem_len = 8, 8, 8
    c.model.p_dropemb = c.model.p_droplyr = 0.1  # one drawn anew each update, one each step
    c.model.revive_codes = 2
    c.optimizer.lr_max, c.optimizer.n_warmup_step, c.optimizer.n_max_step = 1e-2, 4, 20
    c.train.steps, c.train.global_batch_size = 20, 8
    c.train.sequence_len, c.train.update_len = 64, 32
    c.log.every, c.checkpoint.every, c.evaluate.every = 2, 6, 8
    c.sample.every, c.sample.length = 12, 8
    return c
