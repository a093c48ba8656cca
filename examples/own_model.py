"""A model of one's own with `MoELayer`: it learns to copy, is saved, loaded, and runs as before."""

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dispatch import MoELayer, Router

WORDS, K = 16, 32


class Model(nn.Module):
    """An embedding, a residual MoE layer in the style of DeepSeek-V3, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, K)
        self.norm = nn.RMSNorm(K)
        router = Router(2, scoring="sigmoid", groups=4, topk_groups=2, correction_bias=True, scale=1.5)
        self.moe = MoELayer(K, N=16, E=8, router=router, shared_N=16)
        self.head = nn.Linear(K, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[…, WORDS]`` of tokens ``[…]``."""
        hidden = self.embedding(tokens)
        logits: Tensor = self.head(hidden + self.moe(self.norm(hidden)))
        return logits


def main() -> None:
    """Train for a few steps on a CPU or a GPU, then save and load."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Model().to(device)
    tokens = torch.arange(WORDS, device=device)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.2f} -> {losses[-1]:.2f}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        torch.save(model.state_dict(), path)
        loaded = Model().to(device)
        loaded.load_state_dict(torch.load(path, map_location=device))
    with torch.no_grad():
        print(f"loaded model gives the same: {torch.allclose(loaded(tokens), model(tokens), atol=1e-5)}")


if __name__ == "__main__":
    main()
