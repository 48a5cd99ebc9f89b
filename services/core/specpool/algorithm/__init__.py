"""The algorithm, pure: tensors and numbers in, tensors and numbers out.

No RPC, no metrics, no clock, no global random generator: everything random is a function of (seed, position).
"""
