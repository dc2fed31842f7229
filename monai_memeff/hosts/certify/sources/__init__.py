"""Where the subject of a certificate comes from: a MONAI bundle, a trained nnU-Net model, a Python function."""
