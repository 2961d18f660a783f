"""Train the sample base model: a 7.5 M-parameter Llama on the text of Python's own standard library.

Why this text: every machine with Python has it, it is under the PSF licence, and it holds prose (the language
reference, docstrings, comments) as well as code. Nothing is downloaded.

    python -m samples.base.make_base --out samples/base/model            # about an hour on 2 CPU cores
    python -m samples.base.make_base --out /tmp/tiny --tokens 200000     # a quick look

The run is resumable: kill it and start it again with the same arguments. Output: config.json, model.safetensors
(fp16), tokenizer.json, tokenizer_config.json, chat_template.jinja, generation_config.json and TRAINING.json with the
held-out perplexity, corpus hash, seed and the count of fp16-rounded values.

The optimizer is Muon for the matrices (Jordan et al. 2024, from
torch.optim) and AdamW for the rest; learning rate: warm-up, constant, linear decay over the last 30 %.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from samples.base.corpus import build_corpus, shuffled_documents
from samples.base.tokenizer import CONTEXT, VOCAB, encode, train_tokenizer

HIDDEN, INTER, LAYERS, HEADS, KV_HEADS = 384, 1024, 4, 6, 2


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
