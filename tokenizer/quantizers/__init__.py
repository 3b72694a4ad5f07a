"""Quantizers: latents to code indices and code vectors."""
