"""The `specpool` command. Start reading at `main.py`."""
