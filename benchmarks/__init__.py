"""Measurements of the kernels beside every contender that the machine can run."""
