"""llama.cpp: `python -m qalora_runtimes.llama_cpp`."""

from qalora_runtimes.records import Runner

NAME = "llama.cpp"
RUNNER = Runner(
    module="qalora_runtimes.llama_cpp",
    package="xllamacpp",
    artifact="GGUF file",
    taps="qalora_runtimes.llama_cpp.taps",
    remedies={
        "SIGSEGV": "a kernel read outside its memory. llama.cpp built for AMX does so on Q4_1 prompts: run it without "
        "extra buffers (--no-repack; here --exact) or with a build without AMX; if a new wheel's C API alone crashes, "
        "--through server avoids it",
    },
)
