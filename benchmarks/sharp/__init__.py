"""What perceptual and adversarial losses change: the same codes, networks and images."""
