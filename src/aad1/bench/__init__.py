"""`aad1 bench`: how long each stage of streaming takes, and what each part of the fast path gains.

aad1 bench 1.3b --baseline --json bench.json
python -m aad1.bench 14b --fp8 --ablate          # needs torch, numpy and safetensors only
"""
