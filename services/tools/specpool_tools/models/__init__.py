"""Fetching: a catalogue of known models and prompt sets, kept in the user's cache directory.

Nothing here imports torch at module level: `catalogue` answers from the file system alone.
"""
