"""QLoRA's layers: gradients are those of the product with their dequantized weights, also after an evaluation."""

import bitsandbytes
import torch
from torch import nn

from qalora_export.comparison.lora import adapted, add_adapters, merged_weight, to_nf4
from qalora_export.recipe import TrainSettings


def gradient(layer: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """Of the sum of the outputs by x; None where the layer has no way back."""
    asked = x.clone().requires_grad_()
    y = layer(asked)
    return torch.autograd.grad(y.sum(), asked)[0] if y.requires_grad else None


def test_an_evaluation_leaves_the_gradients_of_training_alone() -> None:
    """Without what to_nf4 says there, no gradient passes a layer that was evaluated, where the processor has AVX-512
    BF16: adapters of the last layers went on learning, and a QLoRA that was 0.6 nats too bad looked like a result.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    to_nf4(model, ["0"])
    layer, x = model[0], torch.randn(4, 128)
    weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    for _ in range(2):
        found = gradient(layer.train(), x)
        assert found is not None
        torch.testing.assert_close(found, weight.sum(0).expand(4, -1))
        with torch.no_grad():
            torch.testing.assert_close(layer.eval()(x), x @ weight.T)


def test_what_is_merged_after_an_evaluation_is_what_was_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64, bias=False))
    to_nf4(model, ["0"])
    add_adapters(model, ["0"], TrainSettings(rank=4), 0)
    (layer,) = adapted(model).values()
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
        x = torch.randn(4, 128)
        y = model.eval()(x)
        torch.testing.assert_close(y, x @ merged_weight(layer).T, rtol=1e-4, atol=1e-4)
