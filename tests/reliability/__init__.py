"""What hospitals' disks hold: hundreds of malformed inputs, and no traceback, hang or wrong result."""
