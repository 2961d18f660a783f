"""GPT-2's alphabet: a printable character in the place of each byte."""

from __future__ import annotations


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in of each byte 0..255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_in = {byte: byte for byte in printable}
    stand_in |= {byte: 256 + n for n, byte in enumerate(b for b in range(256) if b not in stand_in)}
    return [chr(stand_in[byte]) for byte in range(256)]
