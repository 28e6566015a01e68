"""Checkpoints on disk: names, safetensors files, strict accounting, reading and atomic writing."""
