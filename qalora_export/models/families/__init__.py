"""One table per architecture: names, permutations, metadata. A family is admitted only by its own parity test."""

from qalora_export.models.families.family import Bound, Family
from qalora_export.models.families.registry import FAMILIES, MAX_LAYERS, family_of, supported_architectures
from qalora_export.models.families.rope import Rope, rope_of

__all__ = ["FAMILIES", "MAX_LAYERS", "Bound", "Family", "Rope", "family_of", "rope_of", "supported_architectures"]
