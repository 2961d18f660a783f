"""export_gguf: nothing differs, nothing is half-written, equal inputs give equal bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from qalora_export.checkpoint.canonical import CanonicalCheckpoint
from qalora_export.checkpoint.canonical_writer import CanonicalWriter
from qalora_export.errors import InputError, ParityError, UnsafeInputError
from qalora_export.formats.contents import FolderContents, compare
from qalora_export.formats.gguf import export as export_module
from qalora_export.formats.gguf import split
from qalora_export.formats.gguf.export import export_gguf
from qalora_export.formats.gguf.read import read_back, runtime_dequantized
from qalora_export.grid import GroupAffine, PackedAffine, differing
from qalora_export.recipe import GgufSettings
from qalora_export.safety import sha256_file
from tests.formats.gguf.f32_twin import write_f32_twin
from tests.models import make_tiny_canonical, round_to_nearest
from tests.verify.exports import Exported, copy_of, gguf_value, patch

ROOT = Path(__file__).parents[3]


def variant(source: Path, target: Path, change: dict[str, GroupAffine]) -> Path:
    """A copy of a canonical checkpoint with some matrices replaced or added (plain weights of those names dropped)."""
    checkpoint = CanonicalCheckpoint(source)
    with CanonicalWriter(target, checkpoint.config, checkpoint.companions(), kind="base") as out:
        for name in checkpoint.plain_names():
            if name.removesuffix(".weight") not in change:
                out.add(name, np.asarray(checkpoint.tensor(name)))
        for module in [*checkpoint.modules, *(m for m in change if m not in checkpoint.modules)]:
            out.add_quantized(module, change[module] if module in change else checkpoint.group_affine(module))
    return target


def eight_bits(source: Path, *, sym: bool) -> dict[str, GroupAffine]:
    head = np.asarray(CanonicalCheckpoint(source).tensor("lm_head.weight"))
    return {"lm_head": round_to_nearest(head, 8, 32, sym=sym)}


@pytest.mark.parametrize("layout", ["q4_1", "split"])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (3, 64), (2, 128)])
def test_round_trip_and_the_runtimes_own_dequantizer(
    tiny_model: Path, tmp_path: Path, layout: str, bits: int, group: int
) -> None:
    model = make_tiny_canonical(tmp_path / "c", tiny_model, bits=bits, group=group)
    report = export_gguf(model, tmp_path / "m.gguf", GgufSettings(layout=layout))
    assert report.differing == 0
    assert report.compared > 100_000
    adapter = tmp_path / "m.lora.gguf" if layout == "split" else None
    checkpoint, contents = CanonicalCheckpoint(model), read_back(tmp_path / "m.gguf", adapter)
    assert contents.modules == checkpoint.modules
    assert compare(FolderContents(checkpoint), contents).total == 0
    weights = dict(runtime_dequantized(tmp_path / "m.gguf", adapter))
    assert set(weights) == set(checkpoint.modules)
    for module, weight in weights.items():
        assert differing(weight, checkpoint.group_affine(module).dequantize()) == 0


def test_manifest_chains_to_the_checkpoint_and_is_last(tiny_canonical: Path, tmp_path: Path) -> None:
    report = export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings())
    assert report.files == (tmp_path / "m.gguf", tmp_path / "m.gguf.manifest.json")
    manifest = json.loads(report.files[-1].read_text())
    assert manifest["parents"][0]["sha256"] == sha256_file(tiny_canonical / "manifest.json")
    assert manifest["files"]["m.gguf"]["sha256"] == sha256_file(tmp_path / "m.gguf")
    assert manifest["tensors"]["blk.0.attn_q.weight"]["dtype"] == "Q4_1"
    assert read_back(tmp_path / "m.gguf").metadata["qalora.checkpoint.sha256"] == manifest["parents"][0]["sha256"]
    assert str(tmp_path) not in report.files[-1].read_text()
    export_gguf(tiny_canonical, tmp_path / "again" / "m.gguf", GgufSettings())
    assert (tmp_path / "again" / "m.gguf").read_bytes() == (tmp_path / "m.gguf").read_bytes()
    assert (tmp_path / "again" / "m.gguf.manifest.json").read_bytes() == report.files[-1].read_bytes()


def test_embeddings_and_head_keep_their_type(tiny_canonical: Path, tmp_path: Path) -> None:
    export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings())
    types = read_back(tmp_path / "m.gguf").types
    assert types["model.embed_tokens.weight"] == types["lm_head.weight"] == "F16"
    assert types["model.norm.weight"] == "F32"


def test_a_symmetric_eight_bit_head_is_q8_0_and_a_free_one_is_refused(tiny_canonical: Path, tmp_path: Path) -> None:
    good = variant(tiny_canonical, tmp_path / "good", eight_bits(tiny_canonical, sym=True))
    export_gguf(good, tmp_path / "good.gguf", GgufSettings())
    assert read_back(tmp_path / "good.gguf").types["lm_head.weight"] == "Q8_0"
    bad = variant(tiny_canonical, tmp_path / "bad", eight_bits(tiny_canonical, sym=False))
    with pytest.raises(InputError, match=r"lm_head.*ONNX"):
        export_gguf(bad, tmp_path / "bad.gguf", GgufSettings())
    assert not list(tmp_path.glob("*bad.gguf*"))
    assert export_gguf(bad, tmp_path / "bad.gguf", GgufSettings(layout="split")).differing == 0


def test_a_symmetric_model_needs_no_adapter(tiny_model: Path, tmp_path: Path) -> None:
    model = make_tiny_canonical(tmp_path / "c", tiny_model, sym=True)
    report = export_gguf(model, tmp_path / "m.gguf", GgufSettings(layout="split"))
    assert [path.name for path in report.files] == ["m.gguf", "m.gguf.manifest.json"]
    assert report.types["Q4_0"] == 14


@pytest.mark.parametrize("at", [(0, 0), (-1, -1)], ids=["before anything is written", "when its rows are loaded"])
def test_a_remainder_beyond_float32_is_refused_by_name(
    at: tuple[int, int], tiny_canonical: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(split, "SLAB_BYTES", 1)  # a row at a time
    matrix = CanonicalCheckpoint(tiny_canonical).group_affine("model.layers.0.mlp.up_proj")
    scale, offset = matrix.scale.copy(), matrix.offset.copy()
    scale[at], offset[at] = np.float16(6e-8), np.float16(2048.5)
    bad = variant(
        tiny_canonical, tmp_path / "c", {"model.layers.0.mlp.up_proj": GroupAffine(matrix.codes, scale, offset, 4)}
    )
    with pytest.raises(InputError, match=r"up_proj.*q4_1"):
        export_gguf(bad, tmp_path / "m.gguf", GgufSettings(layout="split"))
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".qalora-lock"] == ["c"]
    assert export_gguf(bad, tmp_path / "m.gguf", GgufSettings()).differing == 0


def test_existing_output_is_refused_unless_forced(tiny_canonical: Path, tmp_path: Path) -> None:
    for name in ("m.gguf", "m.gguf.manifest.json"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match="exists"):
            export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings())
        with pytest.raises(InputError, match="only what this program made"):
            export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings(), force=True)
        assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
        (tmp_path / name).unlink()
    export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings())
    with pytest.raises(InputError, match="exists"):
        export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings())
    export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings(), force=True)


def test_an_adapter_of_the_replaced_model_does_not_stay(tiny_canonical: Path, tmp_path: Path) -> None:
    export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings(layout="split"))
    (tmp_path / "n.lora.gguf").write_text("somebody else's")
    for name in ("m.gguf", "n.gguf"):
        export_gguf(tiny_canonical, tmp_path / name, GgufSettings(), force=True)
    assert not (tmp_path / "m.lora.gguf").exists()
    assert (tmp_path / "n.lora.gguf").exists()


def test_an_output_inside_the_checkpoint_is_refused(tiny_canonical: Path) -> None:
    with pytest.raises(InputError, match="inside an input"):
        export_gguf(tiny_canonical, tiny_canonical / "m.gguf", GgufSettings())


@pytest.mark.parametrize("layout", ["q4_1", "split"])
def test_one_wrong_code_in_the_file_is_found_and_nothing_stays(
    tiny_canonical: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export_module.write_gguf

    def damaging(path: Path, *arguments: object, **options: object) -> object:
        result = real(path, *arguments, **options)
        if ".lora." not in path.name:
            raw = bytearray(path.read_bytes())
            raw[-1] ^= 1
            path.write_bytes(raw)
        return result

    monkeypatch.setattr(export_module, "write_gguf", damaging)
    with pytest.raises(ParityError, match="values differ"):
        export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings(layout=layout))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["q4_1", "split"])
def test_an_exception_half_way_leaves_nothing(
    tiny_canonical: Path, tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def failing(checkpoint: CanonicalCheckpoint, module: str, *rows: object) -> PackedAffine:
        calls.append(module)
        if len(calls) > 20:
            raise OSError(28, "No space left on device")
        return original(checkpoint, module, *rows)

    original = CanonicalCheckpoint.packed
    monkeypatch.setattr(CanonicalCheckpoint, "packed", failing)
    with pytest.raises(InputError, match="No space left"):
        export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings(layout=layout))
    assert not list(tmp_path.iterdir())


def test_killed_half_way_leaves_no_output_and_the_next_run_is_as_if_undisturbed(
    tiny_canonical: Path, tmp_path: Path
) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from qalora_export.checkpoint.canonical import CanonicalCheckpoint as C\n"
        "from qalora_export.formats.gguf.export import export_gguf; from qalora_export.recipe import GgufSettings\n"
        "real = C.packed\n"
        "def slow(self, module, *rows): print(module, flush=True); time.sleep(0.2); return real(self, module, *rows)\n"
        "C.packed = slow\n"
        "export_gguf(Path(sys.argv[1]), Path(sys.argv[2]), GgufSettings())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_canonical), str(tmp_path / "m.gguf")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "m.gguf").exists()
    assert not (tmp_path / "m.gguf.manifest.json").exists()
    export_gguf(tiny_canonical, tmp_path / "m.gguf", GgufSettings())
    export_gguf(tiny_canonical, tmp_path / "other" / "m.gguf", GgufSettings())
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "other" / "m.gguf").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_checkpoints_that_do_not_fit_their_config(tiny_canonical: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(tiny_canonical, tmp_path / "c"))
    (broken / "manifest.json").unlink()  # which would refute the config before it is read
    raw = json.loads((broken / "config.json").read_text())
    for change, said in [
        ({"num_hidden_layers": 3}, r"layers\.2"),
        ({"num_hidden_layers": 1}, "no name"),
        ({"architectures": ["GPT2LMHeadModel"]}, "LlamaForCausalLM"),
        ({"hidden_size": 256}, "embedding is not"),
    ]:
        (broken / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(InputError, match=said):
            export_gguf(broken, tmp_path / "m.gguf", GgufSettings())
    assert not list(tmp_path.glob("*gguf*"))


def test_the_twin_is_dequantized_by_the_canonical_formula(tiny_canonical: Path, tmp_path: Path) -> None:
    write_f32_twin(tiny_canonical, tmp_path / "t.gguf")
    contents, checkpoint = read_back(tmp_path / "t.gguf"), CanonicalCheckpoint(tiny_canonical)
    assert not contents.modules
    for module in checkpoint.modules:
        assert differing(contents.tensor(f"{module}.weight"), checkpoint.group_affine(module).dequantize()) == 0


def test_comparison_names_what_is_missing_or_stored_otherwise(tiny_canonical: Path, tmp_path: Path) -> None:
    write_f32_twin(tiny_canonical, tmp_path / "t.gguf")
    found = compare(FolderContents(CanonicalCheckpoint(tiny_canonical)), read_back(tmp_path / "t.gguf"))
    modules = CanonicalCheckpoint(tiny_canonical).modules
    assert set(found.only_left) == set(modules)
    assert set(found.only_right) == {f"{module}.weight" for module in modules}
    assert not found.tensors  # F16 in the checkpoint, F32 in the twin: the same numbers
    assert "(missing)" in found.describe()


def test_more_layers_than_any_model_has_are_refused_before_they_are_named(exported: Exported, tmp_path: Path) -> None:
    """One flipped bit of a number; a table of a million layers took minutes and gigabytes."""
    copy = copy_of(exported, tmp_path)
    patch(copy.gguf, gguf_value(copy.gguf, "llama.block_count"), (2**19 + 2).to_bytes(4, "little"))
    with pytest.raises(UnsafeInputError, match="block_count is 524290"):
        read_back(copy.gguf)
