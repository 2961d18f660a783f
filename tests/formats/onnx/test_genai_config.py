"""What a foreign folder tells ONNX Runtime GenAI is held to a list of harmless keys, its tokenizer files to ours."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from qalora_export.errors import UnsafeInputError
from qalora_export.formats.onnx.validate import read_model


def genai(folder: Path, *path: str, **values: object) -> None:
    """Set keys at a path of the GenAI configuration that our exporter would write."""
    config = copy.deepcopy(CONFIG)
    table: Any = config
    for part in path:
        table = table.setdefault(part, {})
    table |= values
    (folder / "genai_config.json").write_text(json.dumps(config))


CONFIG: dict[str, Any] = {
    "model": {
        "type": "llama",
        "eos_token_id": [1, 2],
        "decoder": {
            "filename": "onnx/model.onnx",
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "inputs": {"input_ids": "input_ids", "past_key_names": "past_key_values.%d.key"},
        },
    },
    "search": {"do_sample": False, "max_length": 256, "top_p": 1.0},
}
DECODER = ("model", "decoder")
SESSION = (*DECODER, "session_options")
GENAI_ATTACKS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "another model in a parent folder": (DECODER, {"filename": "../other/onnx/model.onnx"}),
    "an absolute path": (DECODER, {"filename": "/bin/sh"}),
    "a model that nobody checked": (DECODER, {"filename": "second.onnx"}),
    "native code": (SESSION, {"custom_ops_library": "evil.so"}),
    "a profile is written": (SESSION, {"enable_profiling": "/tmp/profile"}),
    "an entry that is handed to the runtime": (SESSION, {"session.optimized_model_filepath": "/tmp/x"}),
    "a context file": (SESSION, {"ep.context_file_path": "/tmp/x"}),
    "a provider library": (SESSION, {"provider_options": [{"qnn": {"backend_path": "evil.so"}}]}),
    "a provider by name": (SESSION, {"providers": ["cuda"]}),
    "run options": (DECODER, {"run_options": {"x": "y"}}),
    "a pipeline": (DECODER, {"pipeline": [{"a": {"session_options": {"custom_ops_library": "evil.so"}}}]}),
    "data of another file": (DECODER, {"shared_initializers": [{"data_file": "/etc/passwd"}]}),
    "a vision model": (("model",), {"vision": {"filename": "vision.onnx"}}),
    "a speech configuration": (("model",), {"speech": {"config_filename": "/etc/passwd"}}),
    "a draft model": (("model",), {"mtp": {"filename": "mtp.onnx"}}),
    "an engine": ((), {"engine": {"dynamic_batching": {}}}),
    "a key that nobody knows": (("search",), {"profile_path": "/tmp/x"}),
    "a table where a number belongs": (("search",), {"max_length": {"custom_ops_library": "evil.so"}}),
    "a number beyond 32 bits": (("search",), {"max_length": 2**40}),
    "infinity": (("search",), {"temperature": float("inf")}),
}


@pytest.mark.parametrize(("path", "values"), GENAI_ATTACKS.values(), ids=GENAI_ATTACKS.keys())
def test_a_genai_config_holds_only_keys_known_to_be_harmless(
    victim: Path, path: tuple[str, ...], values: dict[str, object]
) -> None:
    genai(victim, *path, **values)
    with pytest.raises(UnsafeInputError, match="|".join(values)):
        read_model(victim)


@pytest.mark.parametrize("config", [[], "x", {"model": []}, {"model": {"decoder": {"inputs": ["a"]}}}])
def test_a_genai_config_of_another_shape_is_unsafe(victim: Path, config: object) -> None:
    (victim / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeInputError, match="is no table"):
        read_model(victim)


def test_harmless_keys_of_the_runtimes_schema_pass(victim: Path) -> None:
    genai(victim, *SESSION, intra_op_num_threads=2, enable_mem_pattern=True, graph_optimization_level="ORT_ENABLE_ALL")
    assert read_model(victim)
    genai(victim, *DECODER, sliding_window={"window_size": 512, "layers": [0, 2], "cache_slack": 0})
    assert read_model(victim)
    genai(victim)
    assert read_model(victim)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer_module.json", {"tiktoken_file": "../../secret.json"}, "tiktoken_file is '../../secret.json'"),
        ("tokenizer_module.json", {"tokenizer_class": ["x"]}, "not what we write there"),
        ("tokenizer_module.json", {"added_tokens": []}, "added_tokens is not what we write there"),
        ("tokenizer_module.json", [], "the whole file"),
        ("tokenizer_config.json", {"tiktoken_file": "vocab.tiktoken"}, "tiktoken_file is not what we write there"),
    ],
)
def test_genai_is_sent_to_no_other_tokenizer_file(victim: Path, name: str, content: object, said: str) -> None:
    (victim / name).write_text(json.dumps(content))
    with pytest.raises(UnsafeInputError, match=re.escape(said)):
        read_model(victim)


def test_the_tokenizer_that_genai_is_given_is_no_link(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (victim / "tokenizer_module.json").write_text(json.dumps({"tiktoken_file": "genai_tokenizer.json"}))
    (victim / "genai_tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(UnsafeInputError):
        read_model(victim)
