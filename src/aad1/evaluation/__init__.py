"""`aad1 evaluate`: brings a model, a world and the metrics of `aad1.evaluate` together."""
