"""`memeff estimate`: what a network will need, which system suits it, and the overlay that keeps a budget."""

from monai_memeff.hosts.estimate.command import run_estimate

__all__ = ["run_estimate"]
