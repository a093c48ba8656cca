"""What several backends do around their GEMMs: route, quantise, activate, combine. Each has its torch reference.

Rows of a token buffer are called rows; the (token, k) pairs of the router are called slots, numbered m·topk + j.
"""
