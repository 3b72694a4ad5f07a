"""How fast quantization, training and sampling are, beside peers and as sizes grow."""
