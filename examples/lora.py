"""LoRA adapters on the queries of a PEER layer and on the linear map after it, trained, then merged into the weights.

pip install peft
python examples/lora.py
"""

import copy

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn

from peer_dist import PEER

DIM = 64


def main() -> None:
    """Fit another model's output, training the adapters alone."""
    torch.manual_seed(0)
    ffw = PEER(DIM, num_experts=64**2, heads=4, top_k=8, key_dim=32, query_norm="rms", gate="sigmoid")
    model = nn.Sequential(nn.Linear(DIM, DIM), ffw, nn.Linear(DIM, DIM))
    x, other = torch.randn(512, DIM), copy.deepcopy(model)
    with torch.no_grad():
        other[2].weight += torch.randn(DIM, 2) @ torch.randn(2, DIM) / 4
        target = other(x)

    model = get_peft_model(model, LoraConfig(r=4, target_modules=["query", "2"]))  # model[1].query and model[2]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(100):
        loss = F.mse_loss(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{sum(p.numel() for p in trained):,} parameters trained: loss {losses[0]:.3f} -> {losses[-1]:.3f}")

    with torch.no_grad():
        adapted = model(x)
        merged = model.merge_and_unload()  # without a trace of PEFT
        print(f"merged, the output differs by {float((merged(x) - adapted).abs().max()):.0e}")


if __name__ == "__main__":
    main()
