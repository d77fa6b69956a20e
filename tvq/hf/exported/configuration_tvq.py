"""The config of a Transformer-VQ model for `transformers`; it needs no torch."""

from typing import Any

from transformers import PretrainedConfig


class TvqConfig(PretrainedConfig):
    """`tvq` is the config of the run, section by section; its section `model` says what the model is."""

    model_type = "tvq"

    def __init__(self, tvq: dict[str, Any] | None = None, **others: Any) -> None:
        self.tvq = tvq or {}
        model = self.tvq.get("model", {})
        self.vocab_size, self.hidden_size = model.get("n_vocab", 0), model.get("d_model", 0)
        self.num_hidden_layers, self.num_attention_heads = 2 * model.get("n_layer", 0), model.get("n_head", 0)
        super().__init__(**others)
