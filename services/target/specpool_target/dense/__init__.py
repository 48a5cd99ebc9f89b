"""Dense draft distributions on their way to a target, through a process group of two ranks."""
