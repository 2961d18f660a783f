"""verify-parity: proof that an exported model computes the numbers of its checkpoint.

G0 bytes         the written file holds the checkpoint's values, facts and merge      gates/g0_bytes.py
G1 weights       the runtime's own dequantizer gives those numbers                   gates/g1_weights.py
G2 exact path    rounding-free kernels give the reference's logits                   gates/g2_exact_path.py
G3 shipped path  every layer of the kernels that ship does what it documents         gates/g3_shipped_path.py
G4 decode        token by token on the KV cache is the same as the whole prompt      gates/g4_decode.py
G5 text          token ids and rendered conversations are the same                   gates/g5_text.py

Each gate states what it compares and every bound with its reason, and registers itself (`gates/registry.py`); so does
each runtime in `runtimes/` (`runtimes/record.py`). Imports go one way:

    metrics, rule, identity, store → probes/ → kernels/ → runtimes/ → check, reference/ → session, target → gates/
    → bisect/ → report/ → foreign/ → device/ → stage

metrics     distances between logits            session   what the gates of one run share
rule        what a gate is, when it passes      target    one runtime and its artifact, measured on demand; gates/
identity    which files were verified           bisect/   which layer and tensor broke
store       answers kept between runs           report/   table, report.json, report.html, junit.xml
probes/     what is asked                       stage     the run itself
kernels/    each matrix product of a runtime against the arithmetic that it documents
runtimes/   reading an artifact back, runs
check       before a run: artifacts, runtimes, probe set
device/     the questions of a run as a folder for another machine, and its answers in place of the runtimes
foreign/    a file of another tool beside the plain model it was made from: which part broke
reference/  what is right: float32 logits, each layer by itself, the merge, the text; what the model was made from
"""
