"""What `tvq export` writes beside the weights, so that transformers reads them without tvq.

`exported/` holds the model in PyTorch: data to be copied, never imported here.
"""

import importlib.resources
import json
from collections.abc import Callable

from tvq import config
from tvq.data.vocabulary import Vocabulary
from tvq.errors import InputError
from tvq.hf import tokenizer
from tvq.schema import END, PAD, Config

CODE = ("modeling_tvq.py", "configuration_tvq.py")


def files(c: Config) -> dict[str, str]:
    """The text of each file but the tokenizer's, by name. InputError: PyTorch's model lacks this attention.

    `config.json` holds the config of the run under `tvq`, where `tvq import` reads it again.
    """
    if c.model.attention != "vq":
        raise InputError(
            f"--format=hf: config.model.attention is {c.model.attention}, and the model in PyTorch has vq"
            " alone; omit --format"
        )
    folder = importlib.resources.files(__name__) / "exported"
    told = {
        "architectures": ["TvqForCausalLM"],
        "model_type": "tvq",
        "dtype": c.model.param_dtype,
        "auto_map": {
            "AutoConfig": "configuration_tvq.TvqConfig",
            "AutoModelForCausalLM": "modeling_tvq.TvqForCausalLM",
        },
        config.NESTED: config.to_dict(c),
    }
    generation = {"bos_token_id": END, "eos_token_id": END, "pad_token_id": PAD}
    as_text = lambda value: json.dumps(value, indent=1) + "\n"
    return {
        config.FILE: as_text(told),
        "generation_config.json": as_text(generation),
        **{name: (folder / name).read_text(encoding="utf-8") for name in CODE},
    }


def tokenizer_of(vocabulary: Vocabulary, image_size: int, say: Callable[[str], None]) -> dict[str, str]:
    """The tokenizer's files; none for images, or where `say` tells why."""
    if image_size:
        return {}
    try:
        return tokenizer.files(vocabulary)
    except InputError as error:
        say(f"warning: the folder has no tokenizer: {error}; encode texts with SentencePiece")
        return {}
