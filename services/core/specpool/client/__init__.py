"""A client of the public API, for programs, the command line, the bench and the tests. Never imports torch."""

from specpool.client.checks import valid_text
from specpool.client.client import Client, Completion
from specpool.client.resumable_stream import ResumePolicy

__all__ = ["Client", "Completion", "ResumePolicy", "valid_text"]
