"""`python -m monai_memeff` is the command `memeff`."""

from monai_memeff.cli import main

if __name__ == "__main__":
    main()
