"""From a `model:` block or a directory to a network with weights, and back."""
