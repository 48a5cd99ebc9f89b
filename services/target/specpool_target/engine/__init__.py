"""The engine thread of a target: its loop, its scheduler, and the state of each sequence.

Start reading at `engine.py`: receive, admit, forward, verify, commit, observe, choose next, report.
"""
