"""VBench-I2V: make its video set, run its official code in its own environment, merge the results.

VBench (github.com/Vchitect/VBench) is never imported here: a checkout and a Python environment that
the user names are driven from outside. docs/vbench.md has the steps.
"""
