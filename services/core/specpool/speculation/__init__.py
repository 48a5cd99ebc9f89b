"""The target's side of the Speculate stream, for any engine; and what both sides of it check. Imports no torch.

Start reading at `handshake`.
"""
