"""One decoder, driven by its config, for every supported family."""
