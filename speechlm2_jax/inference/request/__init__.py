"""What a GenerationConfig asks for: keys, values, processors, one request."""
