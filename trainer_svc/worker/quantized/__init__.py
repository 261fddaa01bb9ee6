"""Frozen base weights in 4 or 8 bits, under trained adapters (QLoRA)."""
