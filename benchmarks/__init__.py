"""What measures: results as JSON with their commands, and tables made from them."""
