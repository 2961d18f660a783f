"""The llama.cpp runner in its own process against PyTorch, its two ways against each other, adapters, text, errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from qalora_runtimes.launch import run_runner
from qalora_runtimes.protocol import Job, TextRequest, make_job
from qalora_runtimes.side_by_side import SIDE_BY_SIDE

from tests.runtimes.artifacts import write_gguf, write_lora
from tests.runtimes.conftest import worst_nmse

EXACT = 1e-9
TEXTS = ("", "Hello, world", "naïve café — 東京 🙂\n\n  x", "<|end|> inside 1234567", "   ", "\t\r\n")
CHAT = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "Turn on the lights 🙂"})


def ask(model: Path, job: Job, folder: Path, **options) -> np.ndarray:
    result = run_runner("llama.cpp", model=model, job=job, workdir=folder, **options)
    assert result.status == "ok", (result.message, result.log)
    return result.logprobs


def test_exact_prefill_and_decode_are_pytorchs_numbers(tiny_gguf, job, expected, tmp_path):
    prefill = run_runner("llama.cpp", model=tiny_gguf, job=job, workdir=tmp_path / "p", exact=True)
    decode = run_runner(
        "llama.cpp", model=tiny_gguf, job=make_job(job.sequences, "decode"), workdir=tmp_path / "d", exact=True
    )
    assert worst_nmse(prefill.logprobs, expected) < EXACT
    assert worst_nmse(decode.logprobs, expected) < EXACT
    fingerprint = prefill.fingerprint
    assert fingerprint["settings"]["kv_dtype_k"] == fingerprint["settings"]["kv_dtype_v"] == "f32"
    assert fingerprint["settings"]["flash_attention"] == "disabled"
    assert "C API" in fingerprint["logits_through"]
    assert fingerprint["exact"]
    assert fingerprint["prefill_tokens_per_second"] > 0
    assert decode.fingerprint["decode_tokens_per_second"] > 0
    assert fingerprint["peak_rss_bytes"] > 1 << 20
    assert fingerprint["machine"]["cores"]


def test_sequences_that_decode_side_by_side_see_their_own_tokens_alone(tiny_gguf, tmp_path):
    """More of them than share a batch, of all lengths, in no order: every row is that of the sequence by itself."""
    random = np.random.default_rng(0)
    sequences = [random.integers(0, 100, length).tolist() for length in (3, 40, 1, 17, 17, *range(2, 20))]
    job = make_job(sequences, "decode")
    result = run_runner("llama.cpp", model=tiny_gguf, job=job, workdir=tmp_path / "all", exact=True)
    assert result.status == "ok", result.message
    assert 1 < result.fingerprint["settings"]["sequences"] <= SIDE_BY_SIDE
    alone = ask(tiny_gguf, make_job(sequences, "prefill"), tmp_path / "alone", exact=True)
    assert worst_nmse(result.logprobs, alone.astype(np.float64)) < 1e-12
    shipped = run_runner("llama.cpp", model=tiny_gguf, job=job, workdir=tmp_path / "shipped")
    assert "sequences" not in shipped.fingerprint["settings"]  # the kernels of one token are what a user runs


def test_shipped_settings_are_llama_cpps_defaults(tiny_gguf, job, expected, tmp_path):
    result = run_runner("llama.cpp", model=tiny_gguf, job=job, workdir=tmp_path)
    assert result.fingerprint["settings"]["kv_dtype_k"] == "f16"
    assert EXACT < worst_nmse(result.logprobs, expected) < 1e-4  # the f16 KV cache shows


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_the_server_gives_the_same_numbers_as_the_c_api(tiny_gguf, tmp_path, mode):
    """One position at a time: every prefix fresh, or one new token on the cache; both checked by the client."""
    job = make_job([[1, 2, 3, 4, 5], [1, 2, 9]], mode)
    direct = ask(tiny_gguf, job, tmp_path / "direct", exact=True)
    served = ask(tiny_gguf, job, tmp_path / "served", exact=True, options=["--through", "server"])
    assert worst_nmse(served, direct.astype(np.float64)) < 1e-12


def test_an_adapter_adds_exactly_b_times_a(tiny_model, tiny_gguf, job, tmp_path):
    random = np.random.default_rng(3)
    a, b = (random.normal(size=shape).astype(np.float32) * 0.2 for shape in ((4, 128), (64, 4)))
    adapter = write_lora(tmp_path / "a.gguf", layer=1, a=a, b=b)
    merged = write_gguf(tiny_model, tmp_path / "m.gguf", changes={"model.layers.1.self_attn.v_proj": b @ a})
    plain = ask(tiny_gguf, job, tmp_path / "plain", exact=True)
    adapted = ask(tiny_gguf, job, tmp_path / "adapted", exact=True, lora=adapter)
    wanted = ask(merged, job, tmp_path / "merged", exact=True).astype(np.float64)
    assert worst_nmse(adapted, wanted) < EXACT
    assert worst_nmse(plain, wanted) > 1e-4


def test_token_ids_and_chat_are_those_of_transformers(tiny_model, tiny_gguf, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    request = TextRequest(TEXTS, (CHAT,))
    result = run_runner("llama.cpp", model=tiny_gguf, job=make_job([[1]], text=request), workdir=tmp_path)
    answers = result.text_answers
    assert answers["texts"] == [tokenizer(text).input_ids for text in TEXTS]
    assert answers["texts_literal"] == [
        tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids for text in TEXTS
    ]
    assert answers["rendered_ids"] == [tokenizer.apply_chat_template(CHAT, add_generation_prompt=True)["input_ids"]]
    rendered = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert answers["rendered"] == [rendered.removeprefix(tokenizer.bos_token)]  # llama.cpp puts BOS back as an id
    assert (answers["adds_bos"], answers["bos_id"], answers["errors"]) == (True, tokenizer.bos_token_id, [])


REFUSED = {
    "absent": ("model not found", {}),
    "no gguf": ("cannot load", {}),
    "an id outside the vocabulary": ("outside the model's vocabulary", {"job": make_job([[0, 10**6]])}),
    "an absent adapter": ("adapter not found", {"lora": Path("/nowhere/a.gguf")}),
    "an adapter that is a model": ("cannot load the adapter", {"lora": "model"}),
    "two models": ("--server decides", {"options": ["--server", "http://127.0.0.1:1"]}),
    "no threads": ("at least 1", {"threads": 0}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_run_is_one_line_and_no_answer(tiny_gguf, tmp_path, case):
    words, changes = REFUSED[case]
    model = {"absent": tmp_path / "absent.gguf", "no gguf": Path(__file__)}.get(case, tiny_gguf)
    changes = {name: tiny_gguf if value == "model" else value for name, value in changes.items()}
    result = run_runner("llama.cpp", **({"model": model, "job": make_job([[1, 2]]), "workdir": tmp_path} | changes))
    assert result.status == "refused"
    assert words in result.message
    assert "exit code 2" in result.message
    assert result.logprobs is None
    assert not (tmp_path / "logits.npz").exists()


@pytest.mark.parametrize(
    ("options", "package"), [([], "xllamacpp"), (["--backend", "llama-cpp-python"], "llama-cpp-python")]
)
def test_a_missing_package_is_named_with_the_pip_command(tiny_gguf, tmp_path, monkeypatch, options, package):
    for module in ("xllamacpp", "llama_cpp"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    result = run_runner("llama.cpp", model=tiny_gguf, job=make_job([[1]]), workdir=tmp_path / "w", options=options)
    assert result.status == "missing"
    assert f"pip install {package}" in result.message
