"""Configuration and weights of a `transformers` model from a local directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from specpool.errors import InvalidArgument
from specpool_engine.modeling.files import quiet_transformers
from specpool_engine.modeling.spec import ModelSpec


def read_config(spec: ModelSpec, directory: Path) -> Any:
    """The `transformers` configuration of a model, with the layers that are asked for."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory)
    except (ValueError, OSError, KeyError) as error:
        raise InvalidArgument(
            f"cannot use the configuration of {spec.text!r}: {error}", reason="MODEL_UNSUPPORTED"
        ) from error
    if spec.num_layers is not None:
        _keep_first_layers(spec, config.get_text_config())
    return config


def _keep_first_layers(spec: ModelSpec, config: Any) -> None:
    if spec.num_layers is None or spec.num_layers > config.num_hidden_layers:
        raise InvalidArgument(
            f"{spec.text!r} asks for {spec.num_layers} layers; the model has {config.num_hidden_layers}",
            metadata={"field": "layers", "value": spec.num_layers, "accepted": config.num_hidden_layers},
        )
    config.num_hidden_layers = spec.num_layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: spec.num_layers]


def read_model(spec: ModelSpec, directory: Path, dtype: torch.dtype, *, distributed_config: Any = None) -> Any:
    """The `transformers` model; with `distributed_config` (collectively) this rank's part, on its device."""
    from transformers import AutoModelForCausalLM

    config = read_config(spec, directory)
    extra = {} if distributed_config is None else {"distributed_config": distributed_config}
    try:
        with quiet_transformers():  # it would report the layers left out on purpose
            return AutoModelForCausalLM.from_pretrained(directory, config=config, dtype=dtype, **extra)
    except (ValueError, OSError) as error:
        raise InvalidArgument(
            f"cannot load the weights of {spec.text!r}: {error}", reason="MODEL_UNSUPPORTED"
        ) from error
