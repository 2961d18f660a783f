"""Train the sample base model: a 7.5 M-parameter Llama on the text of Python's own standard library.

Why this text: every machine with Python has it, it is under the PSF licence, and it holds prose (the language
reference, docstrings, comments) as well as code. Nothing is downloaded.

    python samples/base/make_base.py --out samples/base/model            # about an hour on 2 CPU cores
    python samples/base/make_base.py --out /tmp/tiny --tokens 200000     # a quick look

The run is resumable: kill it and start it again with the same arguments. Output: config.json, model.safetensors
(fp16), tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and TRAINING.json with the
held-out perplexity, corpus hash, seed and the count of fp16-rounded values.

Byte-level BPE with Llama 3's splitting expression; the optimizer is Muon for the matrices (Jordan et al. 2024, from
torch.optim) and AdamW for the rest; learning rate: warm-up, constant, linear decay over the last 30 %.
"""

import argparse
import ast
import hashlib
import json
import math
import os
import platform
import sysconfig
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, END, USER, ASSISTANT, SYSTEM, PAD = (
    "<|begin_of_text|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|pad|>",
)
SPECIALS = [BOS, END, USER, ASSISTANT, SYSTEM, PAD]
# Llama 3's splitting expression; llama.cpp knows it as `llama-bpe`.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{{- '<|' + message['role'] + '|>\n' + message['content'] | trim + '<|end|>\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>\n' }}{%- endif %}"
)
VOCAB, HIDDEN, INTER, LAYERS, HEADS, KV_HEADS, CONTEXT = 3072, 384, 1024, 4, 6, 2, 512
SKIP_DIRS = {
    "test",
    "tests",
    "site-packages",
    "idlelib",
    "turtledemo",
    "encodings",
    "__pycache__",
    "ensurepip",
    "idle_test",
    "_bundled",
    "config",
}


def library_files() -> list[tuple[str, str]]:
    """(relative name, text) of every standard-library source outside tests, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if SKIP_DIRS.intersection(parts[:-1]) or any(p.startswith("config-") for p in parts):
            continue
        if parts[-1] == "topics.py":  # read as prose below, not as one giant dict literal
            continue
        text = path.read_text(encoding="utf-8", errors="ignore").strip()
        if len(text) > 200:
            found.append(("/".join(parts), text))
    return found


def dialogues(text: str) -> list[str]:
    """Docstrings as one-turn conversations, so that the role tokens have trained embeddings."""
    out = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        doc = ast.get_docstring(node)
        if doc and 20 < len(doc) < 800:
            arguments = "" if isinstance(node, ast.ClassDef) else f"({ast.unparse(node.args)})"
            out.append(f"{USER}\nWhat does {node.name}{arguments[:160]} do?{END}\n{ASSISTANT}\n{doc.strip()}{END}\n")
    return out


def build_corpus() -> tuple[list[str], list[str]]:
    """(training documents, held-out documents); a document is held out by the hash of its name (about 3 %)."""
    from pydoc_data import topics

    documents = library_files()
    pairs: list[tuple[str, str]] = []
    for name, text in documents:
        try:
            talk = dialogues(text)
        except SyntaxError:
            continue
        pairs += [(name, turn) for turn in talk]
    documents += [(f"topics/{key}", value.strip()) for key, value in sorted(topics.topics.items()) for _ in range(2)]
    train, held_out = [], []
    for name, text in documents + pairs:
        target = held_out if hashlib.sha256(name.encode()).digest()[0] < 8 else train
        target.append(text)
    return train, held_out


def train_tokenizer(texts: list[str], vocab_size: int = VOCAB) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE(ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS),
        special_tokens=[],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=16,
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.add_special_tokens(SPECIALS)
    bos_id = core.token_to_id(BOS)
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
            ),
        ]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    bos, end = tokenizer.convert_tokens_to_ids([BOS, END])
    ids: list[int] = []
    for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
        ids += [bos, *encoding.ids] if encoding.ids and encoding.ids[-1] == end else [bos, *encoding.ids, end]
    return np.array(ids, dtype=np.uint16)


def shuffled_documents(texts: list[str], seed: int) -> list[str]:
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order]


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, ids: np.ndarray, limit: int = 120_000) -> float:
    """Mean cross-entropy in nats per token over consecutive windows of CONTEXT tokens, fp32."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, min(len(ids), limit) - CONTEXT, CONTEXT * 8):
        rows = [ids[s : s + CONTEXT] for s in range(start, start + CONTEXT * 8, CONTEXT) if s + CONTEXT <= len(ids)]
        batch = torch.from_numpy(np.stack(rows).astype(np.int64))
        loss = model(input_ids=batch, labels=batch).loss
        total, count = total + float(loss) * batch.numel(), count + batch.numel()
    model.train()
    return total / count


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm, decay = 48, max(1, int(steps * 0.3))
    return peak * min(1.0, (step + 1) / warm, (steps - step) / decay)


def make_optimizers(model: LlamaForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = torch.optim.Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01)
    adam = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    return [(muon, 0.02), (adam, 4e-3)]


def save_state(path: Path, model, optimizers, step: int) -> None:
    """Own training state, written and read by this script only (safetensors: no pickle)."""
    from safetensors.torch import save_file

    tensors = {f"model.{n}": p.detach().contiguous() for n, p in model.named_parameters()}
    for index, (optimizer, _) in enumerate(optimizers):
        for key, state in optimizer.state_dict()["state"].items():
            tensors |= {f"opt.{index}.{key}.{n}": v.contiguous() for n, v in state.items() if torch.is_tensor(v)}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"step": str(step)})
    temporary.replace(path)


def load_state(path: Path, model, optimizers) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is not a dict)
        step = int(file.metadata()["step"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    for index, (optimizer, _) in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith(f"opt.{index}."):
                _, _, parameter_index, name = key.split(".", 3)
                state.setdefault(int(parameter_index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=13_000_000, help="training tokens")
    parser.add_argument("--batch", type=int, default=16, help="sequences of 512 tokens per step")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)

    train_texts, held_texts = build_corpus()
    corpus_hash = hashlib.sha256("\0".join(train_texts + held_texts).encode()).hexdigest()
    tokenizer = train_tokenizer(train_texts)
    epoch = 0
    data = encode(tokenizer, shuffled_documents(train_texts, args.seed))
    held = encode(tokenizer, held_texts)
    print(
        f"corpus {sum(map(len, train_texts)) / 1e6:.1f} M characters, {len(data) / 1e6:.2f} M tokens, "
        f"held out {len(held) / 1e3:.0f} k tokens",
        flush=True,
    )

    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INTER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizers = make_optimizers(model)
    steps = args.tokens // (args.batch * CONTEXT)
    state_path = args.out / "training_state.safetensors"
    step = load_state(state_path, model, optimizers) if state_path.exists() else 0
    model.train()
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {steps} steps, from {step}", flush=True
    )

    per_step = args.batch * CONTEXT
    windows = len(data) // per_step
    began, first = time.time(), step
    while step < steps:
        if step // windows != epoch:
            epoch = step // windows
            data = encode(tokenizer, shuffled_documents(train_texts, args.seed + epoch))
        at = (step % windows) * per_step
        batch = torch.from_numpy(data[at : at + per_step].astype(np.int64)).view(args.batch, CONTEXT)
        for optimizer, peak in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, peak)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 20 == 0 or step == steps:
            rate = (step - first) * per_step / (time.time() - began)
            print(
                f"step {step}/{steps} loss {loss.item():.3f} {rate:.0f} tok/s "
                f"ETA {(steps - step) * per_step / rate / 60:.0f} min",
                flush=True,
            )
        if step % 100 == 0:
            save_state(state_path, model, optimizers, step)

    changed = 0
    with torch.no_grad():
        for parameter in model.parameters():
            narrowed = parameter.half().float()
            changed += int((narrowed != parameter).sum())
            parameter.copy_(narrowed)
    loss = held_out_loss(model, held)
    model.to(torch.float16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    record = {
        "held_out_loss_nats": loss,
        "held_out_perplexity": math.exp(loss),
        "tokens": args.tokens,
        "seed": args.seed,
        "corpus_sha256": corpus_hash,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "values_rounded_to_fp16": changed,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (args.out / "TRAINING.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "held_out.txt").write_text("\n\n".join(shuffled_documents(held_texts, args.seed))[:200_000])
    (args.out / "calibration.txt").write_text("\n\n".join(shuffled_documents(train_texts, args.seed))[:300_000])
    state_path.unlink(missing_ok=True)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
