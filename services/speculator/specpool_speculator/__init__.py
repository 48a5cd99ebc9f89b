"""A speculator: drafts ahead for the sequences of many targets. Its state is a cache; every part of it can be lost.

A target's stream comes in at `service.py`; `engine` decides which rows a draft step computes, `tree` is what is drafted
for one sequence, `dense` sends dense draft distributions. Imports neither the target nor the router.
"""
