"""Conversations with a duplex model over WebSockets: two known protocols, and a page."""
