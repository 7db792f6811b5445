"""Augmentation of recordings with NeMo's keys, random by (seed, epoch, batch, example).

`config` has the keys, `variants` what is known before reading (speed, truncation, windows,
padding: lengths are static), `effects` what is drawn as a recording is read.
"""
