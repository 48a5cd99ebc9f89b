"""Traces, and what the metrics of the services have in common. Metrics observe and never steer.

Each service keeps its own metrics in its file `metrics.py`.
"""
