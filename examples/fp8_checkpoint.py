"""Read the experts of one layer from a block FP8 checkpoint, and run them.

    python examples/fp8_checkpoint.py /models/DeepSeek-V3 3

Without arguments a small checkpoint is made first, stored as DeepSeek stores theirs.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from moe_dispatch import ExpertWeights, moe_forward
from moe_dispatch.numerics import quantize_blocks


def small_checkpoint(folder: Path) -> None:
    """A model of one MoE layer with K=128, N=256, E=4: a weight and its scales per expert and projection."""
    tensors = {}
    for expert in range(4):
        for name, shape in (("gate_proj", (256, 128)), ("up_proj", (256, 128)), ("down_proj", (128, 256))):
            codes, scale = quantize_blocks(torch.randn(1, *shape) / shape[1] ** 0.5)
            prefix = f"model.layers.3.mlp.experts.{expert}.{name}"
            tensors[f"{prefix}.weight"], tensors[f"{prefix}.weight_scale_inv"] = codes[0], scale[0]
    save_file(tensors, folder / "model.safetensors")
    config = {
        "model_type": "deepseek_v3", "hidden_size": 128, "moe_intermediate_size": 256, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "hidden_act": "silu",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def main(arguments: list[str]) -> None:
    """Read the whole layer and both halves of it, and run them."""
    if len(arguments) not in (0, 2):
        sys.exit("usage: fp8_checkpoint.py [FOLDER_OF_THE_MODEL NUMBER_OF_THE_LAYER]")
    with tempfile.TemporaryDirectory() as temporary:
        if arguments:
            path, layer = Path(arguments[0]), int(arguments[1])
        else:
            path, layer = Path(temporary), 3
            small_checkpoint(path)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        experts = ExpertWeights.from_safetensors(path, layer, device=device)
        halves = [ExpertWeights.from_safetensors(path, layer, tp=(rank, 2), device=device) for rank in range(2)]
    print(experts)
    hidden = torch.randn(5, experts.K, device=device, dtype=torch.bfloat16)
    weights, ids = torch.randn(5, experts.E, device=device).softmax(1).topk(2)
    out = moe_forward(hidden, experts, weights, ids)
    total = sum(moe_forward(hidden, half, weights, ids).float() for half in halves)
    difference = ((total - out.float()).norm() / out.float().norm()).item()
    print(f"the sum over two processes differs by {difference:.1e}")


if __name__ == "__main__":
    main(sys.argv[1:])
