"""What the command line refuses before it calls anybody."""

from __future__ import annotations

import pytest

from specpool.errors import InvalidArgument
from specpool_tools.cli.generate import GenerateOptions, run_generate

NOBODY = "127.0.0.1:1"
SURROGATE = "a\udcff"


@pytest.mark.parametrize(
    ("prompt", "options", "chat"),
    [
        (SURROGATE, GenerateOptions(endpoint=NOBODY), False),
        (SURROGATE, GenerateOptions(endpoint=NOBODY), True),
        ("x", GenerateOptions(endpoint=NOBODY, model=SURROGATE), False),
        ("x", GenerateOptions(endpoint=NOBODY, stop=(SURROGATE,)), False),
    ],
)
def test_text_that_is_no_unicode(prompt: str, options: GenerateOptions, chat: bool) -> None:
    with pytest.raises(InvalidArgument, match="character 1"):
        run_generate(prompt, options, chat=chat, system="", output="text", stats=False)
