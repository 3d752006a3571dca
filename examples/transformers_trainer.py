"""One feed-forward block of a Llama replaced by PEER, trained in bfloat16 by Hugging Face's Trainer, saved and loaded.

pip install 'transformers>=5' accelerate
python examples/transformers_trainer.py [FOLDER]
"""

import sys
import tempfile
from importlib.resources import files

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from peer_dist import PEER

CONTEXT = 64


class PeerLlama(LlamaForCausalLM):
    """A class of its own, so that ``from_pretrained`` builds the layer too."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model.layers[1].mlp = PEER(
            config.hidden_size, num_experts=64**2, heads=4, top_k=8, key_dim=32, query_norm="rms"
        )


class Text(Dataset):
    """Pieces of a text as bytes."""

    def __init__(self, text: bytes) -> None:
        self.pieces = torch.tensor(list(text[: len(text) // CONTEXT * CONTEXT])).view(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.pieces)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.pieces[index], "labels": self.pieces[index]}


def main() -> None:
    """Train, save, load, and compare."""
    folder = sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()
    text = (files("peer_dist") / "data" / "tinyshakespeare.txt").read_bytes()
    torch.manual_seed(0)
    model = PeerLlama(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
        )
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            max_steps=40,
            per_device_train_batch_size=16,
            learning_rate=4e-3,
            bf16=True,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Text(text[:100_000]),
        eval_dataset=Text(text[-4_000:]),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    print(f"loss {before:.3f} before, {after:.3f} after 40 steps")

    trainer.save_model(folder)
    trainer.model = PeerLlama.from_pretrained(folder)
    print(f"loss {trainer.evaluate()['eval_loss']:.3f} loaded again")


if __name__ == "__main__":
    main()
