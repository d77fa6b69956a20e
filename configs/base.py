"""Every field at its default; the schema with the meaning of each is tvq/config.py. Not meant to be run."""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    return config.base()
