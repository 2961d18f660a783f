"""`qalora-export train` with accelerate's FSDP2 over gloo, which accelerate itself offers on accelerators only.

The one thing changed: after accelerate has found several CPU processes, it is told that they are sharded, as it decides
by itself for several GPUs. Everything behind that is accelerate's and torch's own code.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

original = AcceleratorState.__init__


def shard_cpus(self: AcceleratorState, *arguments: object, fsdp_plugin: object = None, **options: object) -> None:
    original(self, *arguments, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin


def prepare(folder: str) -> None:
    """Shard on CPUs, and record in `folder` what was sharded."""
    AcceleratorState.__init__ = shard_cpus
    record_shards(Path(folder))


def record_shards(folder: Path) -> None:
    """Write what this process held when training ended: local and whole bytes of every parameter; who gathers."""
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    from qalora_export.qalora.training import stage as train

    gather = train.run_to_end

    def watched(trainer: object, last: object) -> None:
        gather(trainer, last)
        held = {
            name: [p.to_local().nbytes if isinstance(p, DTensor) else p.nbytes, p.nbytes, str(p.dtype)]
            for name, p in trainer.model.named_parameters()
        }
        gathered = [name for name, module in trainer.model.named_modules() if isinstance(module, FSDPModule)]
        (folder / f"held-{os.environ['RANK']}.json").write_text(json.dumps({"parameters": held, "groups": gathered}))

    train.run_to_end = watched


if __name__ == "__main__":
    prepare(sys.argv.pop(1))
    from qalora_export.cli.main import main

    main()
