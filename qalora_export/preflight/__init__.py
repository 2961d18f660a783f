"""Before `run` starts its first stage: every input of every stage is checked, and what it will take is foretold.

    findings    everything that would stop the run, collected, and what a user may want to know
    machine     what there is here: speed of a matrix product and of the disk, memory, free space
    estimates   what each stage takes: bytes, memory, rough time
    examine     the checks in the order of the line, over a forecast of the base checkpoint

The checks themselves live with their stages (quantization/check.py, formats/*/check.py, verify/check.py and the
planning of the train stage) and read what the stages read, in the same way.
"""
