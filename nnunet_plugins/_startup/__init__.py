"""What the wheel also puts beside the packages, so that nnU-Net finds the trainers; see docs/howto/nnunet.md."""
