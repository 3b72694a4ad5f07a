"""How well the tokenizers reconstruct, beside their baselines and what else is in use."""
