"""The engine thread of a speculator: outcomes in, rows scheduled, one batched forward, tables out.

Start reading at `engine.py`, then `drafter.py`.
"""
