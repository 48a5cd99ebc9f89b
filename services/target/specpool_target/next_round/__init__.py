"""How many tokens a sequence verifies next, from whom, and whether it waits for them: one decision, made here alone.

What it is decided from is measured by this target and reported by its speculators; metrics have no part in it.
"""
