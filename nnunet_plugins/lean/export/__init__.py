"""From logits to label maps and files, a class at a time."""
