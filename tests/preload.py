"""Imported once by the server from which ranks are forked; it must start no threads and run no kernels."""

import contextlib
import gc
import importlib
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # forked ranks are CPU processes, also where tests see a GPU
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from PIL import Image

torch.set_num_threads(1)

import peer_dist.training.trainer  # noqa: E402, F401  Megatron-core and DeepSpeed with it

# What they and TensorBoard import when they are first used.
for name in (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "megatron.core.datasets.gpt_dataset",
    "tensorboard.plugins.hparams.metadata",
    "torch.profiler._cupti_monitor",
    "torch.utils.serialization",
):
    with contextlib.suppress(ImportError):  # another version has no such module
        importlib.import_module(name)
Image.init()

# Ranks would walk through all of these objects, and copy their pages, whenever they collect garbage.
gc.collect()
gc.freeze()
