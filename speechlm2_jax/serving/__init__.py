"""An HTTP server for a SALM: OpenAI's API over continuous batching."""
