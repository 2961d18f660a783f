"""Generate the sample task: a spoken household command → one JSON device call.

    python samples/devices/make_devices.py            # rewrites train.jsonl, validation.jsonl and test.jsonl here

Every line is a chat: {"messages": [{"role": "user", ...}, {"role": "assistant", "content": "{...}"}]}. A sample is a
sentence pattern filled with slot values; the three splits share no (pattern, slot values) combination: the split is
decided by a hash of exactly that combination. Exact match (see score.py) is the metric.
"""

import argparse
import hashlib
import itertools
import json
import random
from pathlib import Path

ROOMS = ["kitchen", "bedroom", "bathroom", "living room", "hallway", "garage", "office", "cellar"]
SWITCHES = ["lamp", "fan", "radio", "heater", "oven", "printer"]
COVERS = ["door", "window", "blinds", "curtain", "gate"]
DIALS = ["lamp", "radio", "heater", "fan"]
TIMERS = ["tea", "pasta", "laundry", "workout"]
LEVELS = list(range(5, 100))
MINUTES = list(range(2, 61))

# intent -> (sentence patterns, slot names). The pattern decides nothing but the wording.
PATTERNS: dict[str, list[str]] = {
    "on": [
        "turn on the {device} in the {room}",
        "switch the {room} {device} on",
        "please start the {device} in the {room}",
        "can you turn the {device} on in the {room}",
        "i need the {room} {device} running",
        "{room} {device} on",
    ],
    "off": [
        "turn off the {device} in the {room}",
        "switch the {room} {device} off",
        "please stop the {device} in the {room}",
        "can you turn the {device} off in the {room}",
        "i no longer need the {room} {device}",
        "{room} {device} off",
    ],
    "open": [
        "open the {device} in the {room}",
        "please open the {room} {device}",
        "could you get the {room} {device} open",
    ],
    "close": [
        "close the {device} in the {room}",
        "please shut the {room} {device}",
        "could you get the {room} {device} closed",
    ],
    "set": [
        "set the {device} in the {room} to {value}",
        "put the {room} {device} at {value}",
        "i want the {device} in the {room} at {value}",
        "change the {room} {device} to {value}",
        "{room} {device} to {value} please",
    ],
    "timer": [
        "set a {device} timer for {value} minutes",
        "remind me about the {device} in {value} minutes",
        "start a {value} minute timer for {device}",
    ],
}
SIZES = {"train": 4000, "validation": 200, "test": 300}


def slot_values(intent: str) -> list[dict[str, object]]:
    """Every combination of slot values an intent can take."""
    if intent in ("on", "off"):
        return [{"device": d, "room": r} for d, r in itertools.product(SWITCHES, ROOMS)]
    if intent in ("open", "close"):
        return [{"device": d, "room": r} for d, r in itertools.product(COVERS, ROOMS)]
    if intent == "set":
        return [{"device": d, "room": r, "value": v} for d, r, v in itertools.product(DIALS, ROOMS, LEVELS)]
    return [{"device": d, "value": v} for d, v in itertools.product(TIMERS, MINUTES)]


def call_for(intent: str, slots: dict[str, object]) -> str:
    """The JSON device call, keys in a fixed order, no spaces."""
    return json.dumps({"action": intent, **slots}, separators=(",", ":"))


def split_of(intent: str, pattern: str, slots: dict[str, object]) -> str:
    key = json.dumps([intent, pattern, slots], sort_keys=True).encode()
    bucket = hashlib.sha256(key).digest()[0]
    return "test" if bucket < 20 else "validation" if bucket < 36 else "train"


def generate(seed: int) -> dict[str, list[dict[str, object]]]:
    """All combinations, shuffled, balanced over intents, cut to SIZES."""
    chooser = random.Random(seed)
    pools: dict[str, dict[str, list[tuple[str, dict[str, object]]]]] = {}
    for intent, patterns in PATTERNS.items():
        for pattern, slots in itertools.product(patterns, slot_values(intent)):
            pools.setdefault(split_of(intent, pattern, slots), {}).setdefault(intent, []).append((pattern, slots))
    result: dict[str, list[dict[str, object]]] = {}
    for split, size in SIZES.items():
        by_intent = pools[split]
        for pool in by_intent.values():
            chooser.shuffle(pool)
        rows, round_number = [], 0
        while len(rows) < size:
            for intent, pool in by_intent.items():
                # The large intents fill up what the small ones run out of.
                if round_number < len(pool) and len(rows) < size:
                    pattern, slots = pool[round_number]
                    rows.append(sample(intent, pattern, slots))
            round_number += 1
        chooser.shuffle(rows)
        result[split] = rows
    return result


def sample(intent: str, pattern: str, slots: dict[str, object]) -> dict[str, object]:
    return {
        "messages": [
            {"role": "user", "content": pattern.format(**slots)},
            {"role": "assistant", "content": call_for(intent, slots)},
        ]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for split, rows in generate(args.seed).items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{split}: {len(rows)} samples")


if __name__ == "__main__":
    main()
