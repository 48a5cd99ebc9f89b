"""The commands and their options. What a command needs is imported inside it, so that `--help` is quick."""
