"""Clients with images: who holds what, encoders, corrupted images."""
