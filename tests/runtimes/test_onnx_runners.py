"""ONNX Runtime and GenAI runners in their own processes against PyTorch; text; graphs that are no decoder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import TextRequest, make_job
from qalora_runtimes.side_by_side import SIDE_BY_SIDE

from tests.runtimes.conftest import worst_nmse

RUNTIMES = ("onnxruntime", "onnxruntime-genai")
EXACT = 1e-9


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_float_graph_gives_pytorchs_numbers(tiny_onnx, job, expected, tmp_path, name, mode):
    result = run_runner(
        name, model=tiny_onnx, job=make_job(job.sequences, mode), workdir=tmp_path, exact=True, threads=1
    )
    assert result.status == "ok", (result.message, result.log)
    assert worst_nmse(result.logprobs, expected) < EXACT
    assert result.fingerprint["runtime"] == name
    assert result.fingerprint[f"{mode}_tokens_per_second"] > 0
    assert result.fingerprint["settings"]["intra_op_threads"] == 1


def test_sequences_that_decode_side_by_side_see_their_own_tokens_alone(tiny_onnx, tmp_path):
    """More of them than share a step, of all lengths, in no order: every row is that of the sequence by itself."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 100, length).tolist() for length in (3, 40, 1, 17, 17, *range(2, 20))]
    together, alone, prompts = (
        run_runner(
            "onnxruntime", model=tiny_onnx, job=make_job(sequences, mode), workdir=tmp_path / str(n), exact=exact
        )
        for n, (mode, exact) in enumerate((("decode", True), ("decode", False), ("prefill", True)))
    )
    assert [result.status for result in (together, alone, prompts)] == ["ok"] * 3
    assert together.fingerprint["settings"]["sequences"] == SIDE_BY_SIDE
    assert "sequences" not in alone.fingerprint["settings"]  # the kernels of one token are what a user runs
    assert worst_nmse(together.logprobs, alone.logprobs.astype(np.float64)) < 1e-12
    assert worst_nmse(together.logprobs, prompts.logprobs.astype(np.float64)) < 1e-12


def test_a_graph_of_one_row_decodes_one_sequence_at_a_time(tiny_onnx, tmp_path):
    """As some tools write it: the batch axis is 1."""
    folder = shutil.copytree(tiny_onnx, tmp_path / "one")
    (file,) = folder.rglob("*.onnx")
    model = onnx.load(file, load_external_data=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, file)
    job = make_job([[1, 2, 3], [4, 5]], "decode")
    one, any_number = (
        run_runner("onnxruntime", model=model, job=job, workdir=tmp_path / model.name, exact=True)
        for model in (folder, tiny_onnx)
    )
    assert one.status == "ok", one.message
    assert worst_nmse(one.logprobs, any_number.logprobs.astype(np.float64)) < 1e-12


def test_genai_answers_for_tokenizer_and_template(tiny_model, tiny_onnx, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ("Hello, world", "naïve café — 東京 🙂", "<|end|> inside 1234567")
    chat = ({"role": "user", "content": "hi"},)
    job = make_job([[1]], text=TextRequest(texts, (chat,)))
    answers = run_runner("onnxruntime-genai", model=tiny_onnx, job=job, workdir=tmp_path).text_answers
    bos = [tokenizer.bos_token_id]
    assert answers["bos_id"] == tokenizer.bos_token_id
    before = bos if answers["adds_bos"] else []
    assert [bos + ids[len(before) :] for ids in answers["texts"]] == [tokenizer(text).input_ids for text in texts]
    assert answers["rendered"] == [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)]
    assert answers["rendered_ids"] == [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]]


def test_a_template_genai_cannot_run_is_reported_and_the_rest_is_answered(tiny_onnx, tmp_path):
    broken = shutil.copytree(tiny_onnx, tmp_path / "broken")
    (broken / "chat_template.jinja").write_text("{% for m in messages %}{{ m.nothing.at.all() }}")
    job = make_job([[1]], text=TextRequest(("a",), (({"role": "user", "content": "hi"},),)))
    result = run_runner("onnxruntime-genai", model=broken, job=job, workdir=tmp_path / "w")
    assert result.status == "ok", result.message
    assert result.text_answers["rendered"] == result.text_answers["rendered_ids"] == [None]
    assert result.text_answers["errors"][0].startswith("chat 0: ")
    assert result.text_answers["texts"][0]


def test_onnx_runtime_has_no_tokenizer(tiny_onnx, tmp_path):
    result = run_runner("onnxruntime", model=tiny_onnx, job=make_job([[1]], text=TextRequest(("a",))), workdir=tmp_path)
    assert result.status == "ok"
    assert result.text_answers is None


def save_graph(folder: Path, inputs: list[str]) -> Path:
    """A one-node graph that is no decoder."""
    shape = [1, 2, "past", 4]
    node = onnx.helper.make_node("Identity", [inputs[0]], ["logits"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in inputs]
    out = [onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, shape)]
    model = onnx.helper.make_model(
        onnx.helper.make_graph([node], "g", values, out),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=10,
    )
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    return folder


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        (["x"], "no decoder"),
        (["input_ids", "past_key_values.0.key"], "no present output"),
    ],
)
def test_a_graph_that_is_no_decoder_is_refused(tmp_path, inputs, words):
    folder = save_graph(tmp_path / "g", inputs)
    result = run_runner("onnxruntime", model=folder, job=make_job([[1]]), workdir=tmp_path / "w")
    assert result.status == "refused"
    assert words in result.message


@pytest.mark.parametrize("name", RUNTIMES)
def test_a_broken_folder_and_a_bad_id_are_one_line(tiny_onnx, tmp_path, name):
    (tmp_path / "empty").mkdir()
    for folder, job, words in (
        (tmp_path / "empty", make_job([[1]]), ("cannot load", "no usable genai_config")),
        (tiny_onnx, make_job([[10**6]]), ("outside the model's vocabulary",)),
    ):
        result = run_runner(name, model=folder, job=job, workdir=tmp_path / "w")
        assert result.status == "refused"
        assert any(word in result.message for word in words), result.message


def test_a_sequence_longer_than_the_context_is_refused(tiny_onnx, tmp_path):
    folder = shutil.copytree(tiny_onnx, tmp_path / "short")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["context_length"] = 4
    (folder / "genai_config.json").write_text(json.dumps(config))
    result = run_runner("onnxruntime-genai", model=folder, job=make_job([range(5)]), workdir=tmp_path / "w")
    assert "context_length" in result.message
    assert (
        run_runner("onnxruntime-genai", model=folder, job=make_job([range(4)]), workdir=tmp_path / "w").status == "ok"
    )


@pytest.mark.parametrize(
    ("name", "module"), [("onnxruntime", "onnxruntime"), ("onnxruntime-genai", "onnxruntime_genai")]
)
def test_a_missing_package_is_named_with_the_pip_command(tiny_onnx, tmp_path, monkeypatch, name, module):
    (tmp_path / f"{module}.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_runner(name, model=tiny_onnx, job=make_job([[1]]), workdir=tmp_path / "w")
    assert result.status == "missing"
    assert f"pip install {name}" in result.message
    assert np.all(result.logprobs is None)
