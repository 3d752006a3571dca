"""What all ranks have alike starts the same on every device."""

import pytest
import torch

from peer_dist import PEER, ProductKeyMemory
from tests.gpu.device import DEVICE

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "build",
    [
        lambda device: PEER(64, 4096, heads=2, top_k=4, key_dim=32, seed=5, device=device),
        lambda device: PEER(
            64, 4096, heads=2, top_k=4, key_dim=32, seed=5, output_gate=True, dense_hidden=48, device=device
        ),
        lambda device: ProductKeyMemory(64, 4096, heads=2, top_k=4, key_dim=32, seed=5, device=device),
        lambda device: ProductKeyMemory(
            64, 4096, 2, 4, query_norm="none", query_projection=False, init="dense", seed=5, device=device
        ),
    ],
    ids=["PEER", "PEER with gates", "memory", "memory, dense"],
)
def test_replicated_weights_do_not_depend_on_the_device(build) -> None:
    here, there = (build(device).state_dict() for device in ("cpu", DEVICE))
    for name in here.keys() - {"down", "up", "values"}:
        assert there[name].device.type == DEVICE.type
        assert torch.equal(here[name], there[name].cpu()), name
