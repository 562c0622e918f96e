"""Softmax cross-entropy, by class and by position: what `softmax_cross_entropy` is made of."""
