"""From a prompt or a recording to text: generation, streams, long audio."""
