"""Prediction by tiles, whose logits go to disk as they are done."""
