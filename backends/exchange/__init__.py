"""Kernels that carry tokens and results between the ranks of an expert-parallel group.

They know tensors and addresses only. What an exchange is stands in `moe_dispatch.parallel`, which finds these modules
by name.
"""
