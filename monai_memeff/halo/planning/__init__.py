"""What a network needs to be run in parts: captured, bound to rules, scheduled and accounted, before anything runs."""
