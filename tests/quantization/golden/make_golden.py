"""Makes the golden GPTQ files with the real libraries; run it once in each library's own environment, never in ours.

    python3.11 -m venv A && A/bin/pip install torch==2.13.0 transformers==4.44.2 peft==0.12.0 accelerate==0.33.0 \
        numpy==1.26.4 "pandas<3" "pyarrow<17" "datasets<3" rouge gekko sentencepiece
    A/bin/pip install --no-deps auto-gptq==0.7.1
    python3.11 -m venv B && B/bin/pip install gptqmodel==7.3.6 torch==2.14.1 torchvision

    A/bin/python tests/quantization/golden/make_golden.py       # autogptq.npz
    B/bin/python tests/quantization/golden/make_golden.py       # gptqmodel.npz
    A/bin/python tests/quantization/golden/make_golden.py BASE  # autogptq/: BASE, a tiny Transformers model, quantized

    python3.11 -m venv C && C/bin/pip install auto-round==0.16.1 torch==2.13.0 transformers==5.23.0
    C/bin/python tests/quantization/golden/make_golden.py BASE  # autoround.npz: a layer of BASE as AutoRound exports it

Each npz holds, per case, what the library's packer wrote and `weight`, float16 (out, in), its own dequantization. The
libraries' code runs as it is, on a CPU: AutoGPTQ asks CUDA to synchronize and moves layers there, both answered here.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

HERE = Path(__file__).parent
OUT, SAMPLES = 32, 256
LAYER = "model.layers.0.self_attn.k_proj"  # of BASE


@dataclass(frozen=True)
class Case:
    """positive: some groups hold no negative weight, so their zero point is 0."""

    bits: int
    sym: bool
    group: int
    width: int = 0  # in-features; 0: the group size, at least 64
    desc_act: bool = False
    static_groups: bool = False
    positive: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", self.width or max(self.group, 64))

    @property
    def name(self) -> str:
        extra = {"act": self.desc_act, "static": self.static_groups, "zero": self.positive, "uneven": self.width % 64}
        flags = "".join(f"-{name}" for name, on in extra.items() if on)
        return f"{self.bits}-{'sym' if self.sym else 'asym'}-g{self.group}{flags}"


CASES = [
    *(Case(bits, True, group) for bits, group in ((2, 32), (3, 32), (4, 128), (4, -1), (8, 64))),
    *(Case(bits, False, group) for bits, group in ((2, 64), (3, -1), (4, 64), (8, 32))),
    *(Case(bits, False, 32, positive=True) for bits in (2, 3, 4, 8)),
    Case(4, True, 64, width=96),
    Case(4, True, 32, desc_act=True),
    Case(4, False, 32, desc_act=True, static_groups=True),
]


def make_layer(case: Case, seed: int) -> tuple[nn.Linear, Tensor]:
    """A linear layer (OUT, width) in float16 precision and calibration inputs (SAMPLES, width)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, case.width, generator=generator) * 0.05
    weight *= 1 + torch.rand(OUT, 1, generator=generator)
    if case.positive:
        weight[::3, 32:64].abs_()
        weight[1, :32].abs_()
    layer = nn.Linear(case.width, OUT, bias=False)
    layer.weight.data = weight.half().float()
    spread = 0.2 + 2 * torch.rand(case.width, generator=generator)
    return layer, torch.randn(SAMPLES, case.width, generator=generator) * spread


def autogptq(case: Case, seed: int) -> dict[str, Tensor] | None:
    """None where a zero point is 0 and the case does not ask for one: this packer would lose its neighbours."""
    from auto_gptq.quantization.gptq import GPTQ
    from auto_gptq.utils.import_utils import dynamically_import_QuantLinear

    layer, inputs = make_layer(case, seed)
    solver = GPTQ(layer)
    solver.quantizer.configure(case.bits, perchannel=True, sym=case.sym, mse=False)
    solver.add_batch(inputs, layer(inputs))
    scale, zero, g_idx = solver.fasterquant(
        group_size=case.group, actorder=case.desc_act, static_groups=case.static_groups
    )
    if bool((zero == 0).any()) != case.positive:
        return None
    QuantLinear = dynamically_import_QuantLinear(
        use_triton=False,
        desc_act=case.desc_act or case.width % max(case.group, 1) > 0,
        group_size=case.group,
        bits=case.bits,
        disable_exllama=True,
        disable_exllamav2=True,
    )
    packed = QuantLinear(case.bits, case.group, case.width, OUT, False)
    layer.weight.data = layer.weight.data.half()
    packed.pack(layer, scale.half(), zero.half(), g_idx)
    weight = packed(torch.eye(case.width, dtype=torch.float16)).T  # forward of the identity: every weight times 1
    parts = {name: getattr(packed, name) for name in ("qweight", "qzeros", "scales", "g_idx")}
    return parts | {"weight": weight, "zeros": zero.to(torch.uint8)}


def gptqmodel(case: Case, seed: int) -> dict[str, Tensor]:
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.quantization import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ
    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    layer, inputs = make_layer(case, seed)
    config = QuantizeConfig(
        bits=case.bits,
        group_size=case.group,
        sym=case.sym,
        desc_act=case.desc_act,
        act_group_aware=False,
        static_groups=case.static_groups,
        device="cpu",
    )
    solver = GPTQ(layer, config)
    solver.quantizer.configure(perchannel=True)
    solver.add_batch(inputs[None], layer(inputs)[None])
    quantized, scale, zero, g_idx = solver.quantize()[:4]
    layer.weight.data = quantized.float()
    packed = TorchLinear(case.bits, case.group, case.sym, case.desc_act, case.width, OUT)
    packed.pack_original(layer, scale.cpu(), zero.cpu(), g_idx.cpu())
    packed.post_init()
    packed.eval()
    weight = packed.dequantize_weight().T.half()
    parts = {name: getattr(packed, name).clone() for name in ("qweight", "scales", "g_idx", "qzeros")}
    parts["qzeros_v2"] = parts.pop("qzeros")
    convert_gptq_v2_to_v1_format_module(packed, config)
    parts["qzeros"] = packed.qzeros.clone()
    if case.bits == 3:  # before 6.1 all word sizes went the way that is now left to words of other than 32 bits
        packed.qzeros.data.copy_(parts["qzeros_v2"])
        packed.pack_dtype = torch.int16
        convert_gptq_v2_to_v1_format_module(packed, config)
        parts["qzeros_before_6_1"] = packed.qzeros.clone()
    return parts | {"weight": weight, "zeros": zero.cpu().to(torch.uint8)}


def write(library: str, version: str) -> None:
    arrays, described = {}, {}
    for case in CASES:
        make = autogptq if library == "autogptq" else gptqmodel
        parts = next(found for seed in range(100) if (found := make(case, seed)))
        arrays |= {f"{case.name}/{part}": value.detach().cpu().numpy() for part, value in parts.items()}
        described[case.name] = {"bits": case.bits, "sym": case.sym, "group_size": case.group, "desc_act": case.desc_act}
    info = {"library": library, "version": version, "torch": torch.__version__, "cases": described}
    arrays["info"] = np.frombuffer(json.dumps(info).encode(), np.uint8)
    np.savez_compressed(HERE / f"{library}.npz", **arrays)
    print(f"{library} {version}: {len(CASES)} cases, {(HERE / f'{library}.npz').stat().st_size} bytes")


def write_model(base: str) -> None:
    """The whole of AutoGPTQ's way: quantize and save_quantized of a model, 4 bits, asymmetric, groups of 32."""
    import auto_gptq.modeling._base as modeling
    from auto_gptq import BaseQuantizeConfig
    from auto_gptq.modeling import LlamaGPTQForCausalLM
    from transformers import AutoModelForCausalLM

    modeling.CUDA_0 = torch.device("cpu")
    model = LlamaGPTQForCausalLM(
        AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float16),
        False,
        BaseQuantizeConfig(bits=4, group_size=32, sym=False, desc_act=False),
    )
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.model.config.vocab_size
    ids = [torch.randint(vocabulary, (1, 64), generator=generator) for _ in range(32)]
    model.quantize([{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in ids])
    model.save_quantized(str(HERE / "autogptq"), use_safetensors=True)


def write_autoround(base: str, version: str) -> None:
    """One layer of every export of AutoRound that is packed as GPTQ; `weight` by its own QuantLinear."""
    from auto_round import AutoRound
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    arrays, described = {}, {}
    cases = [(bits, sym, "auto_round:auto_gptq") for bits in (2, 3, 4) for sym in (True, False)]
    for bits, sym, packing in [
        *cases,
        (8, True, "auto_round:auto_gptq"),
        (2, False, "auto_round"),
        (3, False, "auto_round"),
    ]:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            rtn = {"iters": 0, "disable_opt_rtn": True}
            made = AutoRound(
                model, AutoTokenizer.from_pretrained(base), bits=bits, group_size=32, sym=sym, device_map="cpu", **rtn
            )
            made.quantize_and_save(folder, format=packing)
            file = next(Path(folder).rglob("model.safetensors"))
            config = json.loads((file.parent / "config.json").read_text())["quantization_config"]
            tensors = {
                name.removeprefix(f"{LAYER}."): v for name, v in load_file(file).items() if name.startswith(LAYER)
            }
        assert config["packing_format"] == packing
        out, width = tensors["scales"].shape[1], tensors["scales"].shape[0] * 32
        kind = qlinear_torch if packing == "auto_round" else qlinear_torch_zp
        packed = kind.QuantLinear(bits, 32, width, out, False, weight_dtype=torch.float16)
        packed.load_state_dict(tensors)
        packed.post_init()
        name = f"{bits}-{'sym' if sym else 'asym'}-{packing.replace(':', '-')}"
        parts = tensors | {"weight": packed(torch.eye(width, dtype=torch.float16)).T}
        arrays |= {f"{name}/{part}": value.detach().numpy() for part, value in parts.items()}
        described[name] = config
    info = {"library": "auto-round", "version": version, "torch": torch.__version__, "cases": described}
    arrays["info"] = np.frombuffer(json.dumps(info).encode(), np.uint8)
    np.savez_compressed(HERE / "autoround.npz", **arrays)
    print(f"auto-round {version}: {len(described)} cases, {(HERE / 'autoround.npz').stat().st_size} bytes")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.cuda.synchronize = lambda *_: None
    if importlib.util.find_spec("auto_round"):
        import auto_round as library

        write_autoround(sys.argv[1], library.__version__)
    elif len(sys.argv) > 1:
        write_model(sys.argv[1])
    elif importlib.util.find_spec("gptqmodel"):
        import gptqmodel as library

        write("gptqmodel", library.__version__)
    else:
        import auto_gptq as library

        write("autogptq", library.__version__)
