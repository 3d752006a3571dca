"""A step of a layer as a CUDA graph: captured once, and replayed with other tokens."""

from __future__ import annotations

import pytest
import torch

from peer_dist import PEER, ProductKeyMemory
from peer_dist.sharding import GridLayout
from peer_dist.sharding.transport import Alone
from tests.gpu.device import DEVICE, assert_same, needs_gpu

pytestmark = [pytest.mark.gpu, needs_gpu]
SIZES = {"dim": 96, "heads": 3, "top_k": 8, "key_dim": 32, "query_norm": "rms", "seed": 1}
KINDS = {"peer": (PEER, {"num_experts": 32**2}), "product-key memory": (ProductKeyMemory, {"num_values": 32**2})}


class Routed(GridLayout):
    """One process that sends its tokens to itself, and keeps sizes on the device."""

    transport = Alone(sizes_on_device=True)
    spread = True


@pytest.mark.parametrize("routed", [False, True], ids=["whole", "routed"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_replayed_step_is_that_of_its_tokens(kind, routed):
    layer_type, sizes = KINDS[kind]
    layer = layer_type(**SIZES, **sizes, device=DEVICE)
    if routed:
        layer.layout = Routed(32**2, SIZES["dim"])
    x = torch.randn(40, SIZES["dim"], device=DEVICE, requires_grad=True)
    dy = torch.randn_like(x)

    def step():
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *layer.parameters()], dy)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles the kernels
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            dy.copy_(torch.randn_like(dy))
        graph.replay()
        assert_same(replayed, step(), 1e-6)
