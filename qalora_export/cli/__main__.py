"""python -m qalora_export.cli"""

from qalora_export.cli.main import main

main()
