"""Conversations that go on: samples in and the model's output out, chunk by chunk."""
