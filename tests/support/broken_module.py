"""A module that cannot be imported."""

assert False, "no CUDA toolkit here"  # noqa: B011, PT015 - what DeepGEMM does at import without one
