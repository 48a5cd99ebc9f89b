"""The `specpool` command line."""
