"""Every field at its default; the meaning of each stands in tvq/schema.py. Not meant to be run."""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    return config.base()
