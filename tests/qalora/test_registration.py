"""Transformers learns quant_method "qalora" whichever package is imported first, and torch waits until it is needed."""

import subprocess
import sys

import pytest

CHECK = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; assert 'qalora' in m"
ORDERS = {
    "ours first, twice": f"import qalora_export as q; q.register_with_transformers(); {CHECK}",
    "Transformers first": f"import transformers.quantizers.auto; import qalora_export; {CHECK}",
    "no torch": "import sys, qalora_export, qalora_export.grid, qalora_export.checkpoint.canonical; "
    "assert not {'torch', 'transformers'} & set(sys.modules)",
}


@pytest.mark.parametrize("order", ORDERS)
def test_import_order(order: str) -> None:
    done = subprocess.run([sys.executable, "-c", ORDERS[order]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
