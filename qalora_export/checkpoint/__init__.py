"""The canonical checkpoint on disk: safetensors shards, JSON config, manifest. numpy only (no torch)."""
