"""Dense draft distributions between one target and one speculator, over a process group of two ranks."""
