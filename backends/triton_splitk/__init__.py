"""GEMM split along K: decode, where few tokens meet many weights."""
