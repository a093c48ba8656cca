"""DeepSeek's DeepGEMM, with the layer around its grouped GEMMs written straight into its layouts."""

from moe_dispatch.backends.deep_gemm.backend import DeepGemmBackend, DeepGemmConfig

__all__ = ["DeepGemmBackend", "DeepGemmConfig"]
