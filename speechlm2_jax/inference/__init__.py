"""From a prompt or a recording to text: generation, streamed text, long recordings."""
