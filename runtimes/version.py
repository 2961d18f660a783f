"""The version of the runners: that of qalora-export, which carries them."""

__version__ = "0.1.0"
