"""Folders of recordings and texts, as people have them -> manifests."""
