"""Fine-tune an MoE layer with a low-rank adapter on every expert, and its router, while the experts stay frozen.

The adapted weights, W + B·A, are tensors of the graph: `moe_forward` is differentiable with respect to them. After the
training they are computed once and kept, and nothing of the adapter is left in the way of the fast backends.
"""

import torch
from torch import Tensor, nn

from moe_dispatch import ExpertWeights, MoELayer, moe_forward

K, N, E, TOPK, RANK = 32, 16, 8, 2, 4


class AdaptedLayer(nn.Module):
    """An MoE layer with adapters of rank RANK on its experts' projections.

    Args:
        layer: The layer, whose experts are frozen here.
    """

    gate_up_a: nn.Parameter
    gate_up_b: nn.Parameter
    down_a: nn.Parameter
    down_b: nn.Parameter

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        self.layer = layer
        layer.experts.requires_grad_(requires_grad=False)
        for name in ("gate_up", "down"):
            experts, rows, columns = getattr(layer.experts, f"{name}_proj").shape
            self.register_parameter(f"{name}_a", nn.Parameter(torch.randn(experts, RANK, columns) / columns**0.5))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(experts, rows, RANK)))

    def adapted(self) -> ExpertWeights:
        """The experts with their adapters."""
        frozen = self.layer.experts
        gate_up = frozen.gate_up_proj + self.gate_up_b @ self.gate_up_a
        down = frozen.down_proj + self.down_b @ self.down_a
        return ExpertWeights(gate_up, down, activation=frozen.activation)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``[M, K]`` to ``[M, K]``."""
        topk_weights, topk_ids, _ = self.layer.gate(hidden_states)
        return moe_forward(hidden_states, self.adapted(), topk_weights, topk_ids)


def main() -> None:
    """Learn a rotation of the layer's output."""
    torch.manual_seed(0)
    layer = MoELayer(K, N, E, TOPK)
    frozen = layer.experts.down_proj.clone()
    hidden = torch.randn(64, K)
    with torch.no_grad():
        target = layer(hidden).roll(1, dims=1)
    model = AdaptedLayer(layer)
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=2e-2)
    losses = []
    for _ in range(15):
        loss = (model(hidden) - target).square().mean() / target.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"relative error {losses[0]:.2f} -> {losses[-1]:.2f}")
    print(f"frozen experts unchanged: {torch.equal(frozen, layer.experts.down_proj)}")
    with torch.no_grad():
        expected = model(hidden)
        layer.experts.assign(model.adapted())
        print(f"merged layer gives the same: {torch.allclose(layer(hidden), expected, atol=1e-5)}")


if __name__ == "__main__":
    main()
