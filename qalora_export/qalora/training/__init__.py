import logging

# Transformers imports PEFT and with it bitsandbytes, which warns that it found no CPU kernels of yet another package;
# nothing here asks for them.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
