"""What `memeff run` takes from a bundle: its configuration, its readers and writers served, its weights."""
