"""The target: verifies draft tokens, commits, and streams what it committed. The truth about a sequence lives here.

A request comes in at `service.py`, is checked in `requests`, runs in `engine`; `verify` is the mathematics of a round
and `next_round` the one decision of what is verified next. Imports neither the speculator nor the router.
"""
