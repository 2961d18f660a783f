"""Torch-free runners: numpy and one runtime; they run on the device."""
