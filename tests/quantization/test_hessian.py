import numpy as np
import torch
from torch import nn

from qalora_export.quantization.hessian import Hessian, collect


class Block(nn.Module):
    """q and k read the same tensor, o another one of the same shape."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.o = (nn.Linear(6, 6, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o(torch.tanh(self.q(x) + self.k(x)))


def test_is_twice_the_mean_outer_product() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(5, 7, 4)).astype(np.float32))
    hessian = Hessian(4, torch.device("cpu"))
    for batch in x:
        hessian.add(batch)
    rows = x.double().numpy().reshape(-1, 4)
    np.testing.assert_allclose(hessian.value().numpy(), 2 * rows.T @ rows / len(rows), rtol=1e-6)


def test_layers_fed_the_same_tensor_share_one() -> None:
    torch.manual_seed(0)
    block, batches = Block(), torch.randn(3, 5, 6)

    def run() -> None:
        for batch in batches:
            with torch.no_grad():
                block(batch)

    found = collect({"q": block.q, "k": block.k, "o": block.o}, run)
    assert found["q"] is found["k"]
    assert found["o"] is not found["q"]
    rows = batches.reshape(-1, 6).double()
    torch.testing.assert_close(found["k"].value(), 2 * rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    hidden = torch.tanh(block.q(batches) + block.k(batches)).detach().reshape(-1, 6).double()
    torch.testing.assert_close(found["o"].value(), 2 * hidden.T @ hidden / len(hidden), rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_afterwards() -> None:
    block = Block()
    collect({"q": block.q}, lambda: None)
    assert not block.q._forward_pre_hooks
