"""Recordings longer than `max_audio_s`: cut into chunks, transcribed, joined."""
