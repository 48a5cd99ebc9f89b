"""The router: the door for clients. Chooses targets, keeps sessions, carries streams on when a target is lost.

`grpc` translates, `auth` says who calls, `sessions` remembers, `placement` knows the pods, `generation` is one request
on its way. Never imports torch.
"""
