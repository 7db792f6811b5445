"""Evaluation of full-duplex models: inputs, plan, run, scores."""
