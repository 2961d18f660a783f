"""Runs under the emulated Python: y = session(x) of every graph in a folder that has an x.npy beside it.

python on_the_device.py FOLDER       NAME.onnx, NAME.x.npy -> NAME.y.npy
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main(folder: Path) -> None:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    for graph in sorted(folder.glob("*.onnx")):
        session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        x = np.load(graph.with_suffix(".x.npy"))
        np.save(graph.with_suffix(".y.npy"), session.run(["y"], {"x": x})[0])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
