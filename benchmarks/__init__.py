"""Whole-layer benchmarks, correctness first; `moe-dispatch bench` runs them."""
