"""The steps that several backends take around their GEMMs: route, gather, quantise, activate, combine, mask ids.

Each is a launcher (``<name>.py``), its Triton kernels (``<name>_kernel.py``) and the same in torch, which runs on a CPU
and is the reference in tests. A slot is one (token, k) pair of the router, numbered m·topk + k; a row is a row of the
buffer in which the tokens of each expert lie side by side.
"""
