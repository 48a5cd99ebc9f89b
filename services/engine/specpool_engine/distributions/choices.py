"""What settings say about the transport of draft distributions. Imports no torch: the command line reads settings."""

from __future__ import annotations

from typing import Literal, get_args

from specpool.errors import ConfigError

TransportChoice = Literal["auto", "grpc", "gloo", "nccl"]
BodyType = Literal["float16", "bfloat16", "float32"]


def check_transport_choice(choice: str) -> None:
    """Raise `ConfigError` for what is no transport."""
    accepted = ", ".join(get_args(TransportChoice))
    if choice not in get_args(TransportChoice):
        raise ConfigError(
            f"distribution_transport must be one of {accepted}, got {choice}",
            metadata={"field": "distribution_transport", "value": choice, "accepted": accepted},
        )
