"""Grouped GEMM over one wave of CTAs: large and middle M."""
