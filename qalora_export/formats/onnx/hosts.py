"""What the hosts of an ONNX folder need beside the graph.

ONNX Runtime GenAI: genai_config.json. transformers.js (so onnxruntime-node, onnxruntime-web): config.json with its own
table `transformers.js_config`, and generation_config.json. Both: the tokenizer's files. transformers.js reads two of
them, tokenizer.json and tokenizer_config.json, so the chat template goes into the latter and, so that there is one,
nowhere else.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qalora_export.checkpoint.generation import GENERATION, TOKEN_IDS, Generation, generation_config, generation_of
from qalora_export.checkpoint.model_folder import TOKENIZER_FILES, ModelFolder
from qalora_export.errors import InputError
from qalora_export.formats.onnx.genai_text.files import MODULE, OWN, genai_files
from qalora_export.formats.onnx.genai_text.reading import GenaiReading
from qalora_export.formats.onnx.genai_text.words import NotPredictableError
from qalora_export.formats.onnx.layout import GENAI_CONFIG, GRAPH, TOKENIZER_CONFIG
from qalora_export.models.families import family_of
from qalora_export.safety import inside, read_json

if TYPE_CHECKING:
    from mobius import ModelPackage

CONFIG = "config.json"
TOKENIZER, TEMPLATE = "tokenizer.json", "chat_template.jinja"
# "fp32": the file without a suffix (otherwise a browser asks for model_quantized.onnx). Data in one file beside it.
TRANSFORMERS_JS = {"dtype": "fp32", "use_external_data_format": True}


def host_files(package: ModelPackage, checkpoint: ModelFolder) -> dict[str, bytes]:
    """The configurations and the tokenizer files of `checkpoint` for every host, by name."""
    generation = generation_config(checkpoint.path, checkpoint.config)
    files = {
        GENAI_CONFIG: _json(_genai_config(package, checkpoint, generation)),
        CONFIG: _json(web_config(checkpoint.config)),
        GENERATION: _json(generation),
    }
    tokenizer = {path.name: path for path in checkpoint.companions() if path.name in TOKENIZER_FILES}
    template = tokenizer.pop(TEMPLATE, None)
    files |= {name: path.read_bytes() for name, path in tokenizer.items()}
    if template is not None:
        files[TOKENIZER_CONFIG] = _with_template(tokenizer.get(TOKENIZER_CONFIG), template)
    own = genai_files(*_tokenizer_tables(checkpoint.path))
    return files | {name: _json(content, indent=2 if name == MODULE else None) for name, content in own.items()}


def genai_tokenizer(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json as ONNX Runtime GenAI gets them from an export of `folder`.

    Raises InputError when one is no table.
    """
    tokenizer, settings = _tokenizer_tables(folder)
    written = genai_files(tokenizer, settings)
    return written.get(OWN, tokenizer), settings | written.get(MODULE, {})


def genai_notes(folder: Path) -> tuple[str, ...]:
    """What the user of an export of `folder` should know of GenAI's own tokenizer."""
    try:
        GenaiReading(*genai_tokenizer(folder))
    except NotPredictableError as error:
        return (f"ONNX Runtime GenAI may not read this tokenizer, gate G5 of verify-parity asks it: {error}",)
    return ()


def _tokenizer_tables(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    tokenizer, settings = (
        read_json(inside(folder, name)) if (folder / name).exists() else {} for name in (TOKENIZER, TOKENIZER_CONFIG)
    )
    if not isinstance(tokenizer, dict) or not isinstance(settings, dict):
        raise InputError(
            "tokenizer.json or tokenizer_config.json is no table", where=folder, fix="fetch the model again"
        )
    if (folder / TEMPLATE).exists():
        settings = settings | {"chat_template": inside(folder, TEMPLATE).read_text(encoding="utf-8")}
    return tokenizer, settings


def web_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json for transformers.js: the checkpoint's own without its quantization, which the graph has replaced, and
    with the context that the graph has.
    """
    exported = family_of(config).exported(config, "onnx")
    kept = {key: value for key, value in exported.items() if key != "quantization_config"}
    return kept | {"transformers.js_config": TRANSFORMERS_JS}


def _with_template(path: Path | None, template: Path) -> bytes:
    """tokenizer_config.json with the text of chat_template.jinja, which Transformers prefers."""
    config = {} if path is None else read_json(path)
    if not isinstance(config, dict):
        raise InputError("not a table", where=path, fix="fetch the model again")
    return _json(config | {"chat_template": template.read_text(encoding="utf-8")})


def _genai_config(package: ModelPackage, checkpoint: ModelFolder, generation: Mapping[str, Any]) -> dict[str, Any]:
    """mobius' own, then our deviations: sampling and token ids as Transformers' `generate` has them by default."""
    from mobius.integrations.ort_genai import write_ort_genai_config

    with tempfile.TemporaryDirectory(prefix="qalora-onnx-") as scratch:
        context = int(web_config(checkpoint.config)["max_position_embeddings"])
        write_ort_genai_config(package, scratch, ep="cpu", context_length=context)
        config: dict[str, Any] = read_json(Path(scratch) / GENAI_CONFIG)
    model = config["model"]
    model["decoder"]["filename"] = GRAPH
    model["type"] = family_of(checkpoint.config).genai_type or model["type"]
    config["search"] |= search_settings(generation_of(checkpoint.path, checkpoint.config))
    for key in TOKEN_IDS:
        if (value := generation.get(key, checkpoint.config.get(key))) is not None:
            model[key] = value
    return config


def search_settings(generation: Generation) -> dict[str, Any]:
    """genai_config.json's `search`; GenAI has no place for min_p."""
    penalty = {"repetition_penalty": generation.repetition_penalty}
    if not generation.do_sample:
        return {"do_sample": False, "temperature": 1.0, "top_k": 1, "top_p": 1.0} | penalty
    drawn = {"temperature": generation.temperature, "top_k": generation.top_k, "top_p": generation.top_p}
    return {"do_sample": True} | drawn | penalty


def _json(content: Mapping[str, Any], *, indent: int | None = 2) -> bytes:
    return (json.dumps(content, indent=indent, ensure_ascii=False) + "\n").encode()
