"""Every field at its default; tvq/schema.py says what each means. Not meant to be run."""

from ml_collections import ConfigDict

from tvq import config


def get_config() -> ConfigDict:
    return config.base()
