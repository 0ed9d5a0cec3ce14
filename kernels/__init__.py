"""Kernel templates in TIR, shaped by a descriptor's numbers; no chip is named here."""
