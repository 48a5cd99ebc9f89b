"""`specpool bench`: off, sd and ssd side by side on a pair of models."""
