"""A PEER layer in a LightningModule, trained in mixed bfloat16 by Lightning's Trainer.

pip install lightning
python examples/lightning_module.py
"""

from importlib.resources import files

import lightning
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from peer_dist import PEER

DIM, CONTEXT = 64, 8


class NextByte(lightning.LightningModule):
    """Predicts a byte from the eight before it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, DIM // CONTEXT * 2)
        self.mix = nn.Linear(CONTEXT * (DIM // CONTEXT * 2), DIM)
        self.ffw = PEER(DIM, num_experts=64**2, heads=4, top_k=8, key_dim=32)  # batch norm of the queries
        self.head = nn.Sequential(nn.LayerNorm(DIM), nn.Linear(DIM, 256))

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """The logits ``[batch, 256]`` for ``context [batch, 8]``."""
        x = self.mix(self.embedding(context).flatten(1))
        return self.head(x + self.ffw(x))

    def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
        """The loss, which Lightning differentiates."""
        context, target = batch
        return F.cross_entropy(self(context), target)

    def validation_step(self, batch: list[torch.Tensor], _: int) -> None:
        """Logs the loss."""
        context, target = batch
        self.log("loss", F.cross_entropy(self(context), target), prog_bar=False)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=4e-3)


def loader(text: bytes, shuffle: bool) -> DataLoader:
    """Batches of eight bytes and the one after them."""
    windows = torch.tensor(list(text)).unfold(0, CONTEXT + 1, 1)
    return DataLoader(TensorDataset(windows[:, :-1], windows[:, -1]), batch_size=256, shuffle=shuffle)


def main() -> None:
    """Train for one epoch."""
    text = (files("peer_dist") / "data" / "tinyshakespeare.txt").read_bytes()
    lightning.seed_everything(0, verbose=False)
    model, held_out = NextByte(), loader(text[-4_000:], shuffle=False)
    trainer = lightning.Trainer(
        accelerator="auto",
        precision="bf16-mixed",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = trainer.validate(model, held_out, verbose=False)[0]["loss"]
    trainer.fit(model, loader(text[:20_000], shuffle=True))
    after = trainer.validate(model, held_out, verbose=False)[0]["loss"]
    print(f"loss {before:.2f} before, {after:.2f} after {trainer.global_step} steps")


if __name__ == "__main__":
    main()
