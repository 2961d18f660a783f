"""What pyproject.toml cannot say: the folder runtimes/ is the import package qalora_runtimes, with all below it."""

from setuptools import find_packages, setup

RUNTIMES = ["qalora_runtimes", *(f"qalora_runtimes.{name}" for name in find_packages("runtimes"))]

setup(
    packages=[*find_packages(include=["qalora_export*"]), *RUNTIMES],
    package_dir={"qalora_runtimes": "runtimes"},
)
