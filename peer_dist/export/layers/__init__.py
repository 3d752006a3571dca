"""The kinds of layer in plain PyTorch, as exported models have them: one file each."""
