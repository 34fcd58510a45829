"""Tests of the paper's claims at small scale: runs the arms, judges them, writes docs/evidence.md.

Kept apart from `aad1 evaluate`, which measures one model: here many are trained and compared.
"""
