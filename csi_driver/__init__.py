"""Tatami: a CSI driver that turns directories into Kubernetes volumes."""

__version__ = "0.1.0.dev0"
