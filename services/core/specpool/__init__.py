"""SpecPool: Speculative Speculative Decoding with a shared pool of speculators."""

__version__ = "0.1.0"
