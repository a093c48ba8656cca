"""One MoE layer whose experts are spread over the ranks of torchrun: GPUs with NCCL, or CPUs with gloo.

torchrun --nproc-per-node 2 examples/expert_parallel.py
"""

# ruff: noqa: S101
import os

import torch
import torch.distributed as dist

from moe_dispatch import ExpertParallel, ExpertWeights, moe_forward

E, TOPK, K, N = 32, 4, 512, 256

on_gpu = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if on_gpu else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
dtype = torch.bfloat16 if on_gpu else torch.float32

# Every rank makes or loads its own experts: here 32 / ranks of them, with consecutive ids.
generator = torch.Generator().manual_seed(rank)
gate_up = torch.randn(E // ranks, 2 * N, K, generator=generator) * K**-0.5
down = torch.randn(E // ranks, K, N, generator=generator) * N**-0.5

ep = ExpertParallel(dist.group.WORLD, tokens="sharded", max_tokens=1024)
layer = ep.shard(ExpertWeights(gate_up.to(device, dtype), down.to(device, dtype)), experts=E)

with torch.no_grad():
    # Measures each exchange at these token counts, and keeps the fastest of each.
    for compared in ep.warm_up(layer, topk=TOPK, tokens=[16, 256]):
        if rank == 0:
            times = ", ".join(f"{name} {us:.0f} µs" for name, us in compared.us.items())
            print(f"M={compared.kind.M} a rank: {compared.chosen} ({times})")

    M = 100 + 20 * rank  # ranks may have different token counts, also none
    hidden_states = torch.randn(M, K).to(device, dtype)
    topk_weights, topk_ids = torch.rand(M, E).topk(TOPK)  # ids of the whole layer
    out = moe_forward(hidden_states, layer, topk_weights.to(device), topk_ids.to(device))
    print(f"rank {rank}: {list(out.shape)} from experts on {ranks} ranks")

    # The counts stated, nothing is exchanged on the host.
    with ep.tokens_per_rank([100 + 20 * each for each in range(ranks)]):
        assert torch.equal(out, moe_forward(hidden_states, layer, topk_weights.to(device), topk_ids.to(device)))

if rank == 0:
    print(ep.explain(layer, TOPK, 256))
dist.destroy_process_group()
