"""Which files are recordings, by their names."""

AUDIO_SUFFIXES = (
    *(".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".webm", ".mp4", ".wma", ".amr"),
    *(".aiff", ".aif", ".aifc", ".au", ".snd", ".caf", ".w64", ".rf64", ".sph", ".nist", ".wv"),
    *(".ape", ".oga", ".mp2", ".mka", ".mkv", ".mov", ".3gp", ".3g2", ".m4b", ".avi", ".flv"),
    *(".ac3", ".tta", ".asf"),
)
"""Suffixes of files that libsndfile or FFmpeg reads, the most usual ones first."""
