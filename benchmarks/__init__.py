"""Benchmarks of whole MoE layers: every result is checked against fp32 before it is timed.

`moe-dispatch bench` measures, and ``python -m moe_dispatch.benchmarks --help`` lists what is made of the rows.
"""
