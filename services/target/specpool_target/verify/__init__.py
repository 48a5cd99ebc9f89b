"""Verification of a step: tensors in, tensors out."""
