"""Bits and errors: codes chosen well, priors inside tokenizers, and files beside other codecs."""
