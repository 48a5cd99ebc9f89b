"""Compiling the decoder: its own code between attention and packed products becomes a few generated kernels.

One graph serves any number of tokens, and every mode of a target runs it, so that speculation stays lossless relative
to the compiled model. Generated code is kept in the cache directory: later starts only trace.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch

from specpool.errors import ConfigError, InvalidArgument
from specpool.paths import cache_directory
from specpool_engine.modeling.files import Progress
from specpool_engine.modeling.interface import Segment
from specpool_engine.modeling.model import TransformersModel
from specpool_engine.modeling.paged_kv import SequenceKV

MIN_TOKENS = 4
"""Least tokens of a forward, to which shorter ones are padded: one token would need a graph of its own, and packed
products pad to four anyway."""


def compile_decoder(model: TransformersModel, on_progress: Progress) -> None:
    """Compile `model` in place, by running it once; takes up to minutes the first time.

    Raises:
        ConfigError: COMPILER_MISSING where there is no C++ compiler.
        InvalidArgument: MODEL_UNSUPPORTED if the model's code cannot be compiled as one graph.
    """
    if model.device.type == "cpu":
        _check_compiler()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_directory() / "compiled"))
    on_progress("compile", 0, 1)
    decoder: Any = model.model.base_model
    decoder.compile(fullgraph=True, dynamic=True)
    model.min_tokens = MIN_TOKENS
    kv = SequenceKV(model.pool)
    try:
        model.forward([Segment(kv=kv, tokens=[0] * (2 * MIN_TOKENS))])
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError) as error:
        raise InvalidArgument(
            f"{type(model.model).__name__} cannot be compiled, leave compile off: {str(error).splitlines()[0]}",
            reason="MODEL_UNSUPPORTED",
            metadata={"field": "compile"},
        ) from error
    finally:
        kv.free()
    # There is one graph for all forwards: checking before each that it still fits costs a twentieth of a draft step.
    # But flex compiles kernels of its own on CUDA, one for each kind of forward, and these checks choose among them.
    if model.backend.name == "flex" and model.device.type == "cuda":
        return on_progress("compile", 1, 1)
    model.around_forward = partial(torch.compiler.set_stance, "default", skip_guard_eval_unsafe=True)
    return on_progress("compile", 1, 1)


def _check_compiler() -> None:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ConfigError(
            "compile needs a C++ compiler and none was found: install g++, or leave compile off",
            reason="COMPILER_MISSING",
            metadata={"field": "compile"},
        ) from error
