"""What every gRPC server and channel of SpecPool has in common: options, errors, traces, start and stop.

May be imported by everything above; knows no service. Start reading at `server.py`.
"""
