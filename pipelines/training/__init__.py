"""The loop, the two stages, and what watches over them."""
