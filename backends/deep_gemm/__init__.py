"""DeepSeek's DeepGEMM, with the layer around its grouped GEMMs written straight into its layouts."""

from .backend import DeepGemmBackend, DeepGemmConfig

__all__ = ["DeepGemmBackend", "DeepGemmConfig"]
