"""Imported once by the server from which ranks are forked; it must start no threads and run no kernels."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch

torch.set_num_threads(1)

# what DeepSpeed, Megatron-core and TensorBoard import when they are first used
import torch.profiler._cupti_monitor  # noqa: E402
import torch.utils.serialization  # noqa: E402
from PIL import Image  # noqa: E402

import peer_dist.training.trainer  # noqa: E402, F401  Megatron-core and DeepSpeed with it

Image.init()
